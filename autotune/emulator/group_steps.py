"""Steps of sm_90's matrix instructions: four warps multiply asynchronously, from registers and shared memory.

A sum is in its registers only when its group was waited for; until then, reading or writing one is a fault. What an
instruction reads, in registers or in shared memory, may not be written before. A register that other instructions have
set may be used only behind a ``wgmma.fence``.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from . import matrix
from .faults import Fault, NotModelled
from .floats import U32, Array
from .matrix_steps import Fragments, across
from .parser import Instruction, Number, Vector
from .state import Mask, State, Step

GROUP = 128
NAME = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2$")


class GroupMultiplier:
    """The ``wgmma`` instructions of an execution, and what is in flight between them."""

    def __init__(self, state: State, fragments: Fragments) -> None:
        self.state, self.fragments = state, fragments
        # Sums that have not arrived, by register, each with its group.
        self.arriving: dict[int, tuple[int, Array]] = {}
        # Operands in registers: group, places, and what was in them.
        self.operands: list[tuple[int, list[int], list[Array]]] = []
        # Reads of shared memory: group, runs of 16 bytes, mask.
        self.reading: list[tuple[Array, Array, Mask]] = []
        self.groups: Array = np.zeros((1, 1), dtype=np.int32)
        # What each register held at the last fence, or got from a product since.
        self.fenced: list[Any] = []
        # Whether there was a fence since the last product was committed.
        self.fence_is_new = False

    def step(self, one: Instruction) -> Step:
        """Makes a step of any ``wgmma`` instruction."""
        if one.guard is not None:
            raise NotModelled(f"{one}: not modelled")
        if one.name == "wgmma.fence.sync.aligned":
            return self._fence
        if one.name == "wgmma.commit_group.sync.aligned":
            return self._commit
        if one.name == "wgmma.wait_group.sync.aligned" and isinstance(one.operands[0], Number):
            pending = one.operands[0].value
            return lambda mask: self._wait(pending, mask)
        return self._multiplication(one)

    def _fence(self, mask: Mask) -> None:
        self.fenced = list(self.state.registers)
        self.fence_is_new = True

    def _check_fenced(self, index: int) -> None:
        """Raises for a register that was set since the last fence, unless by a product: those come in order."""
        if index not in self.arriving and not (self.fenced and self.fenced[index] is self.state.registers[index]):
            self._complain(index, "was set with no fence before an asynchronous product that uses it")

    def _start_from_zero(self, index: int) -> bool:
        """Whether a sum is zero in all threads, behind a new fence.

        The compiler moves the zeros of sums that are used once over the fence. No machine register is set for them.
        """
        value = self.state.registers[index]
        return self.fence_is_new and value is not None and not value.any()

    def _arrive(self, index: int, value: Array) -> None:
        self.state.registers[index] = value
        self.fenced[index] = value

    def _commit(self, mask: Mask) -> None:
        self.fence_is_new = False
        self.groups = self.groups + (1 if mask is None else mask.any(axis=1, keepdims=True))

    def _multiplication(self, one: Instruction) -> Step:
        state, found = self.state, NAME.match(one.name)
        if found is None or state.threads % GROUP or len(one.operands) < 7:
            raise NotModelled(f"{one}: this matrix instruction is not modelled")
        columns, kind = int(found[1]), found[2]
        sums, left, right_operand, keep_operand, *flags = one.operands
        in_registers = isinstance(left, Vector)
        values = [flag.value if isinstance(flag, Number) else None for flag in flags]
        # Signs of A and B, which must be plus; then whether each operand in shared memory is transposed.
        if values[:2] != [1, 1] or len(values) != (3 if in_registers else 4) or len(sums.items) != columns // 2:
            raise NotModelled(f"{one}: not modelled")
        places = [state.source(item, 32, one) for item in left.items] if in_registers else []
        left_place = -1 if in_registers else state.source(left, 64, one)
        right, keep = state.source(right_operand, 64, one), state.source(keep_operand, 1, one)
        groups = state.threads // GROUP

        def step(mask: Mask) -> None:
            mask = state.whole_blocks(mask)
            zeros = {target.index for target in sums.items if self._start_from_zero(target.index)}
            for index in [*places, *(target.index for target in sums.items)]:
                if index not in zeros:
                    self._check_fenced(index)
            if in_registers:
                a = self.fragments.matrix(places, matrix.left_operand, kind)
                a = a.reshape(state.shape[0], groups, 64, 16)
                if mask is None:
                    self.operands.append((int(self.groups.max()), places, [state.registers[one] for one in places]))
            else:
                a = self._operand(left_place, 64, bool(values[2]), kind, mask)
            b = self._operand(right, columns, bool(values[-1]), kind, mask)
            products = matrix.group_multiply(a, b, state.shape)
            for target, product in zip(sums.items, products, strict=True):
                self._add(target, product, state.registers[keep], mask)

        return step

    def _operand(self, place: int, rows: int, transposed: bool, kind: str, mask: Mask) -> Array:
        """An operand in shared memory, float32 ``[blocks, groups, rows, 16]``; ``place``: of its descriptor."""
        state, groups = self.state, self.state.threads // GROUP
        descriptors = state.registers[place]
        descriptors = np.broadcast_to(descriptors, (descriptors.shape[0], state.threads))[:, ::GROUP]
        if mask is not None:
            # The register of a block that is not here means nothing.
            here = np.broadcast_to(mask, (state.shape[0], groups))
            descriptors = np.broadcast_to(descriptors, here.shape)
            descriptors = np.where(here, descriptors, descriptors[here].flat[0])
        addresses = matrix.described(descriptors, rows, transposed)
        runs = addresses[..., ::8, :] if transposed else addresses[..., ::8]
        runs = runs.reshape(len(addresses), -1)
        state.shared.place(runs, 16, None)
        if state.check:
            who = np.repeat(np.arange(groups, dtype=U32) * U32(GROUP), runs.shape[1] // groups)[None]
            state.shared.start_read(runs, 16, who, across(mask, runs.shape[1]))
            self.reading.append((self.groups.copy(), runs, mask))
        (words,) = state.shared.load(addresses.reshape(len(addresses), -1), 2, 1)
        return matrix.numbers_of(words, kind).reshape(state.shape[0], groups, rows, 16)

    def _add(self, target: Any, product: Array, keep: Array, mask: Mask) -> None:
        """Adds a product to the sums of a register, or sets them, where ``keep`` is false."""
        index = target.index
        old = self.arriving[index][1] if index in self.arriving else self.state.registers[index]
        if old is not None:
            product = np.where(keep, product + old.view(np.float32), product)
        elif keep.any():
            raise Fault("undefined register", "sums that nobody set")
        if mask is None:
            self.arriving[index] = (int(self.groups.max()), product.view(U32))
            self.state.registers[index] = None
        else:
            self.state.put(target, product.view(U32), mask)
            self.fenced[index] = self.state.registers[index]

    def _wait(self, pending: int, mask: Mask) -> None:
        last = int(self.groups.max()) - pending
        for index in [index for index, (group, _) in self.arriving.items() if group < last]:
            if self.state.registers[index] is not None:
                self._complain(index)
            self._arrive(index, self.arriving.pop(index)[1])
        for _, places, values in (one for one in self.operands if one[0] < last):
            for place, value in zip(places, values, strict=True):
                if self.state.registers[place] is not value:
                    self._complain(place)
        self.operands = [one for one in self.operands if one[0] >= last]
        left: list[tuple[Array, Array, Mask]] = []
        for group, runs, who in self.reading:
            done = group < self.groups - pending
            if mask is not None:
                done = done & mask.any(axis=1, keepdims=True)
            if done.all():
                self.state.shared.end_read(runs, 16, across(who, runs.shape[1]))
                continue
            if done.any():
                self.state.shared.end_read(runs, 16, across(_both(who, done), runs.shape[1]))
                who = _both(who, ~done)
            left.append((group, runs, who))
        for _, runs, who in left:
            # Another instruction that has ended may have read the same bytes.
            self.state.shared.keep_read(runs, 16, across(who, runs.shape[1]))
        self.reading = left

    def _complain(self, index: int, what: str = "was written while an asynchronous product was using it") -> None:
        name = self.state.kernel.registers[index] if index < len(self.state.kernel.registers) else "a number"
        raise Fault("register race", f"{name} {what}")

    def settle(self) -> None:
        """Lets all sums arrive, when blocks part: who uses their registers too early is not noticed there."""
        for index, (_, value) in self.arriving.items():
            self._arrive(index, value)
        self.arriving.clear()
        self.operands.clear()


def _both(mask: Mask, other: Array) -> Array:
    return other if mask is None else mask & other
