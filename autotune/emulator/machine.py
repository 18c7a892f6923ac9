"""Executes a kernel: all blocks of a launch, and all their threads, in lockstep.

Threads part at branches. A context is a place in the code and the threads that are there. The context that is furthest
behind runs first, so that all meet again where their ways do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .faults import Fault, NotModelled
from .group_steps import GroupMultiplier
from .matrix_steps import Fragments, load_matrix, multiply, store_matrix
from .memory_steps import barrier, copy, fence, load, store
from .parser import Address, Instruction, Label, Register, Vector
from .state import Mask, State, Step
from .thread_steps import arithmetic, move, shuffle

# Instructions of one execution, after which a loop counts as endless.
MOST_STEPS = 50_000_000
# The place of threads that have returned.
END = -1
STEPS: dict[str, Callable[[State, Instruction], Step]] = {
    "ld": load,
    "st": store,
    "cp": copy,
    "bar": barrier,
    "barrier": barrier,
    "fence": fence,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
    "shfl": shuffle,
    "mov": move,
}


@dataclass
class Context:
    """Threads that are at the same place in the code."""

    at: int
    mask: Mask


class Machine:
    """One execution of a kernel. NotModelled is raised here, before anything runs, if an instruction is not known.

    Attributes:
        executed: how many instructions have run, whatever the number of threads.
    """

    def __init__(self, state: State) -> None:
        self.state, self.executed = state, 0
        fragments = Fragments(state)
        self._group = GroupMultiplier(state, fragments)
        self._fragments = fragments
        self._steps = [self._prepared(one) for one in state.kernel.code]

    def _prepared(self, one: Instruction) -> Step:
        try:
            return self._step(one)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            # Operands of another kind than a step takes apart: a form of the instruction that nobody has modelled.
            raise _named(error, one) from error

    def _step(self, one: Instruction) -> Step:
        name = one.parts[0]
        if name == "mma":
            return multiply(self.state, self._fragments, one)
        if name == "wgmma":
            return self._group.step(one)
        if name == "bra":
            return self._branch(one)
        if name in ("ret", "exit"):
            if one.guard is not None:
                raise NotModelled(f"{one}: a guarded return is not modelled")
            return lambda mask: END
        return STEPS.get(name, arithmetic)(self.state, one)

    def _branch(self, one: Instruction) -> Step:
        label = one.operands[0]
        if not isinstance(label, Label) or one.name not in ("bra", "bra.uni"):
            raise NotModelled(f"{one}: not modelled")
        target = self.state.kernel.labels[label.name]
        if one.guard is None:
            return lambda mask: target
        holds = self.state.guard(one)

        def branch(mask: Mask) -> Any:
            taken = holds()
            other = ~taken
            if mask is not None:
                taken, other = taken & mask, other & mask
            if not other.any():
                return target
            return (target, _by_block(taken), _by_block(other)) if taken.any() else None

        return branch

    def run(self) -> None:
        """Runs to the end. Raises Fault, with the instruction, for what the kernel must not do."""
        code = self.state.kernel.code
        contexts = [Context(0, None)]
        while contexts:
            contexts.sort(key=lambda one: one.at, reverse=True)
            now = contexts.pop()
            while contexts and contexts[-1].at == now.at:
                now.mask = _united(now.mask, contexts.pop().mask)
            if now.mask is not None and now.mask.all():
                now.mask = None
            contexts += self._run_until(now, contexts[-1].at if contexts else len(code))
        if self.state.shared.copies and self.state.check:
            # They would write into what may be another block's memory by then.
            raise Fault("shared race", "asynchronous copies were not waited for before the end", code[-1])

    def _run_until(self, context: Context, limit: int) -> list[Context]:
        """Runs a context until it ends, parts or reaches ``limit``; gives what it has become."""
        steps, counts, at, mask = self._steps, self.state.counts, context.at, context.mask
        while at < limit:
            self.executed += 1
            if self.executed > MOST_STEPS:
                raise Fault("endless", "too many instructions", self.state.kernel.code[at])
            if counts is not None:
                counts.execute(at, mask)
            try:
                went = steps[at](mask)
            except Exception as error:  # whatever a step raises gets its instruction, and goes on
                self._explain(error, self.state.kernel.code[at])
                raise
            if went is None:
                at += 1
            elif isinstance(went, tuple):
                target, taken, other = went
                self._group.settle()
                return [Context(target, taken), Context(at + 1, other)]
            elif went == END:
                return []
            else:
                at = went
        return [Context(at, mask)] if at < len(steps) else []

    def _explain(self, error: Exception, one: Instruction) -> None:
        """Raises a fault that names the instruction; returns if the error is not the kernel's."""
        if isinstance(error, Fault) and error.instruction is None:
            raise Fault(error.kind, error.message, one) from None
        if isinstance(error, NotModelled):
            raise _named(error, one) from None
        if isinstance(error, TypeError | AttributeError):
            unset = [part for part in _sources(one) if self.state.registers[part.index] is None]
            if unset:
                name = self.state.kernel.registers[unset[0].index]
                raise Fault("undefined register", f"nobody has set {name}", one) from None


def _named(error: Exception, one: Instruction) -> NotModelled:
    """An error that names the instruction, whether or not it did."""
    text = str(error) if isinstance(error, NotModelled) else "this form is not modelled"
    return NotModelled(text if str(one) in text else f"{one}: {text}")


def _sources(one: Instruction) -> list[Register]:
    """The registers that an instruction reads."""
    found: list[Any] = [one.guard[0]] if one.guard else []
    for place, operand in enumerate(one.operands):
        if isinstance(operand, Address):
            found.append(operand.base)
        elif place or one.parts[0] in ("st", "stmatrix", "bra"):
            found += operand.items if isinstance(operand, Vector) else [operand]
    return [part for part in found if isinstance(part, Register)]


def _by_block(mask: np.ndarray) -> np.ndarray:
    """Makes a mask ``[blocks, 1]`` if it cuts no block."""
    if mask.shape[1] == 1:
        return mask
    whole = np.all(mask, axis=1, keepdims=True)
    return whole if (whole == mask.any(axis=1, keepdims=True)).all() else mask


def _united(first: Mask, second: Mask) -> Mask:
    return None if first is None or second is None else first | second
