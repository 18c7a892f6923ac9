"""LCSB (arXiv 2602.13073): which blocks a step backpropagates through, and how the gradient passes the others."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .hooks import BlockHooks
from .options import MODES, SCHEDULES, UNSELECTED_UPDATES, Mode, Schedule, UnselectedUpdate
from .runner import BlockRunner, Treatment, find_blocks

NORM_DECAY = 0.9  # decay of the running gradient norms that "importance" samples by
EVEN_PART = 0.2  # part of its probability that is spread evenly, so that no block is left out for good


def selected_count(count: int, ratio: float) -> int:
    """The number of blocks that a step trains: ``round(ratio * count)``, but at least one and at most ``count``."""
    return min(count, max(1, round(ratio * count)))


def select_blocks(step: int, count: int, ratio: float, schedule: Schedule, seed: int = 0) -> frozenset[int]:
    """The ``k = selected_count(count, ratio)`` of ``count`` blocks that are selected at ``step``.

    Every schedule covers every block, and is a pure function of its arguments.

    Args:
        schedule: "cyclic" takes windows of neighbours, one after the other and around the end; "strided" takes evenly
            spaced blocks, shifted by one block each step; "random" shuffles the blocks and deals them out, so that
            every round of ``ceil(count / k)`` steps covers all.
        seed: for the shuffles of "random".

    Raises:
        ValueError: there is no such schedule.
    """
    size = selected_count(count, ratio)
    if schedule == "cyclic":
        return frozenset((step * size + offset) % count for offset in range(size))
    if schedule == "strided":
        return frozenset((place * count // size + step) % count for place in range(size))
    if schedule == "random":
        steps = -(-count // size)
        order = random.Random(f"{seed}:{step // steps}").sample(range(count), count)
        first = (step % steps) * size
        return frozenset(order[place % count] for place in range(first, first + size))
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def sample_blocks(step: int, norms: Sequence[float | None], ratio: float, seed: int = 0) -> frozenset[int]:
    """Draws the blocks for ``step`` without replacement, with probabilities that grow with ``norms``.

    A fifth of the probability is spread evenly. The draw is a pure function of the arguments. Efraimidis and Spirakis
    (2006) show that the blocks with the largest ``log(u) / weight``, for uniform ``u``, are such a sample.

    Args:
        norms: the gradient norm of each block; None if it is not known yet, which counts as the largest one.
    """
    count = len(norms)
    most = max((norm for norm in norms if norm is not None), default=0.0) or 1.0
    known = [most if norm is None else norm for norm in norms]
    total = sum(known)
    draw = random.Random(f"{seed}:{step}")
    keys = []
    for norm in known:
        weight = (1 - EVEN_PART) * norm / total + EVEN_PART / count if total > 0 else 1 / count
        keys.append(math.log(1.0 - draw.random()) / weight)
    ranked = sorted(range(count), key=lambda index: keys[index], reverse=True)
    return frozenset(ranked[: selected_count(count, ratio)])


class LayerCyclicManager:
    """Selects the blocks of a model that a step trains (LCSB, arXiv 2602.13073).

    It works on any transformers or PEFT model, by hooks on the blocks that ``remove`` takes off again. On a model made
    by ``mebp_triton.load`` it uses the block engine of the model.

    Args:
        model: the model.
        ratio: the part of the blocks that is selected, in (0, 1].
        mode: how the gradient passes the blocks that are not selected, whose parameters get no gradient. "identity":
            unchanged, as if the block were its residual connection alone. "exact": as it truly would. "freeze": always
            selects the topmost blocks, so no gradient passes the others. "full": selects all blocks.
        schedule: "cyclic", "strided" or "random", see ``select_blocks``; "importance" samples by a running norm of the
            blocks' gradients, see ``sample_blocks``.
        seed: for the schedules that draw random numbers.
        blocks: the path of the block list, for a model in which it is not found.

    Attributes:
        step: the number of optimizer steps so far.
        norms: the running gradient norm of every block, None before its first one; used by "importance" alone.
        selected: the blocks that are trained in this step.

    Raises:
        ValueError: an argument is out of range, the model has a selection already, its blocks are not found, or a block
            that may be selected has no trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float = 0.5,
        mode: Mode = "identity",
        schedule: Schedule = "cyclic",
        seed: int = 0,
        blocks: str | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"selection mode must be one of {', '.join(MODES)}, got {mode!r}")
        if schedule not in SCHEDULES:
            raise ValueError(f"selection schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if not 0 < ratio <= 1:
            raise ValueError(f"selected ratio must lie in (0, 1], got {ratio!r}")
        self.mode, self.ratio, self.schedule, self.seed, self.step = mode, float(ratio), schedule, seed, 0
        runtime = getattr(model, "mebp", None)
        self._own = runtime is None
        self.engine: BlockRunner = BlockHooks(find_blocks(model, blocks)[1]) if runtime is None else runtime.engine
        if isinstance(getattr(self.engine.treatment, "__self__", None), LayerCyclicManager):
            raise ValueError("the model has a selection already: remove() it first")
        self._model = model
        self._handles: list[Any] = []
        self.norms: list[float | None] = [None] * self.count
        self._choose()
        candidates = {"full": (), "freeze": self.selected}.get(mode, range(self.count))
        if idle := [index for index in candidates if not self.engine.trainable(index)]:
            if self._own:
                self.engine.remove()
            raise ValueError(
                f"block {idle[0]} has no trainable parameters and may be selected: put adapters on every block, before "
                f"the selection"
            )
        self.engine.treatment = self.treatment

    @property
    def count(self) -> int:
        """The number of blocks."""
        return len(self.engine.blocks)

    def _select(self) -> frozenset[int]:
        if self.mode == "full":
            return frozenset(range(self.count))
        if self.mode == "freeze":
            return frozenset(range(self.count - selected_count(self.count, self.ratio), self.count))
        if self.schedule == "importance":
            return sample_blocks(self.step, self.norms, self.ratio, self.seed)
        return select_blocks(self.step, self.count, self.ratio, self.schedule, self.seed)

    def _choose(self) -> None:
        self.engine.selection_will_change()
        self.selected = self._select()
        inside = {id(parameter) for block in self.engine.blocks for parameter in block.parameters()}
        self.engine.outer_parameters = [
            parameter for parameter in self._model.parameters() if id(parameter) not in inside
        ]

    def treatment(self, index: int) -> Treatment:
        """How block ``index`` is treated in this step; see ``engine``."""
        if index in self.selected:
            return "train"
        return "identity" if self.mode == "identity" else "exact"

    def record_norms(self, norms: Mapping[int, float]) -> None:
        """Updates the running norms with gradient norms of this step, by block. Ignores what is not finite."""
        for index, norm in norms.items():
            before = self.norms[index]
            if not math.isfinite(norm):
                continue
            self.norms[index] = norm if before is None else NORM_DECAY * before + (1 - NORM_DECAY) * norm

    def advance(self) -> None:
        """Makes the next selection. Call it once per optimizer step, after the backward passes of all micro-batches."""
        self.step += 1
        self._choose()

    def attach(self, optimizer: torch.optim.Optimizer, unselected_update: UnselectedUpdate = "momentum") -> None:
        """Makes every step of ``optimizer`` advance the selection, until ``detach`` or ``remove``.

        An optimizer that was attached before is detached.

        Args:
            optimizer: one of torch's over all trainable parameters of the blocks, or accelerate's wrapper of one. Not
                ``BlockAdamW``, which is told in each step what is selected.
            unselected_update: what happens to blocks that are not selected: "momentum" steps them with a gradient of
                zero, as LCSB does; "none" leaves them as they are.

        Raises:
            ValueError: there is no such update, or the optimizer lacks trainable parameters of a block.
        """
        if unselected_update not in UNSELECTED_UPDATES:
            known = ", ".join(UNSELECTED_UPDATES)
            raise ValueError(f"unselected update must be one of {known}, got {unselected_update!r}")
        optimizer = getattr(optimizer, "optimizer", optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for index in range(self.count):
            if any(id(parameter) not in held for parameter in self.engine.trainable(index)):
                raise ValueError(
                    f"the optimizer lacks trainable parameters of block {index}: make it of all that require a "
                    f"gradient, before the first forward pass"
                )
        self.detach()

        def before(*_: Any) -> None:
            if self.schedule == "importance":
                self.record_norms({index: gradient_norm(self.engine.trainable(index)) for index in self.selected})
            for index in set(range(self.count)) - self.selected:
                for parameter in self.engine.trainable(index):
                    parameter.grad = torch.zeros_like(parameter) if unselected_update == "momentum" else None

        def after(*_: Any) -> None:
            self.advance()

        self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def detach(self) -> None:
        """Ends what ``attach`` began."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """The state of the selection, in types that JSON has."""
        return {
            "step": self.step,
            "mode": self.mode,
            "ratio": self.ratio,
            "schedule": self.schedule,
            "seed": self.seed,
            "norms": list(self.norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned. Raises ValueError if that was a selection with other settings."""
        for key in ("mode", "ratio", "schedule", "seed"):
            if state[key] != getattr(self, key):
                raise ValueError(f"the saved selection has {key} {state[key]!r}, this one {getattr(self, key)!r}")
        if len(state["norms"]) != self.count:
            raise ValueError(f"the saved selection is of {len(state['norms'])} blocks, this one of {self.count}")
        self.norms = [None if norm is None else float(norm) for norm in state["norms"]]
        self.step = int(state["step"])
        self._choose()

    def remove(self) -> None:
        """Ends the selection: every block is trained again, and the hooks of this manager are gone."""
        self.detach()
        if getattr(self.engine.treatment, "__self__", None) is self:
            self.engine.treatment = lambda index: "train"
        if self._own:
            self.engine.remove()


def gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    """The 2-norm of the gradients of all ``parameters`` together; 0.0 if none has a gradient."""
    gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
    return math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient in gradients))
