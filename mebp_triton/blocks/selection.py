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

NORM_DECAY = 0.9  # of the running gradient norms that "importance" samples by
EVEN_PART = 0.2  # of its probability is spread evenly, so that every block is trained again


def selected_count(count: int, ratio: float) -> int:
    """How many of ``count`` blocks a step trains: at least one."""
    return min(count, max(1, round(ratio * count)))


def select_blocks(step: int, count: int, ratio: float, schedule: Schedule, seed: int = 0) -> frozenset[int]:
    """The blocks selected at ``step``: ``max(1, round(ratio * count))`` of ``count``.

    cyclic: windows of neighbours, one after the other, around the end. strided: evenly spaced, shifted by one block a
    step. random: the blocks are shuffled and dealt out, so that every round of ``ceil(count / k)`` steps covers all;
    a pure function of seed and step. Every schedule covers every block.
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
    """As many blocks, without replacement, with probabilities that grow with ``norms``; seeded by seed and step.

    A block whose norm is not known yet counts as the largest. A fifth of the probability is even. (Efraimidis and
    Spirakis 2006: the largest of ``log(u) / weight`` are such a sample.)
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
    """Selects the blocks of a model that a step trains.

    Works on any transformers or PEFT model, by hooks on its blocks (``remove`` takes them off); on a model that
    ``mebp_triton.load`` made, by its block engine.

    Args:
        model: the model.
        ratio: the part of the blocks that is selected, in (0, 1].
        mode: "full" all blocks; "identity" the gradient passes the others unchanged; "exact" it passes them truly but
            their parameters get none; "freeze" only the topmost blocks are trained, always the same.
        schedule: "cyclic", "strided" or "random", see ``select_blocks``; "importance" samples by a running norm of the
            blocks' gradients, see ``sample_blocks``.
        seed: of the random schedules.
        blocks: the path of the block list, where it is not found by itself.

    Attributes:
        step: optimizer steps so far.
        norms: the running gradient norm of every block, None before its first; kept for "importance" alone.
        selected: the blocks that are trained at this step.
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
        self._select_anew()
        able = {"full": (), "freeze": self.selected}.get(mode, range(self.count))
        if idle := [index for index in able if not self.engine.trainable(index)]:
            if self._own:
                self.engine.remove()
            raise ValueError(
                f"block {idle[0]} has no trainable parameters and may be selected: put adapters on every block, before "
                f"the selection"
            )
        self.engine.treatment = self.treatment

    @property
    def count(self) -> int:
        return len(self.engine.blocks)

    def _select(self) -> frozenset[int]:
        if self.mode == "full":
            return frozenset(range(self.count))
        if self.mode == "freeze":
            return frozenset(range(self.count - selected_count(self.count, self.ratio), self.count))
        if self.schedule == "importance":
            return sample_blocks(self.step, self.norms, self.ratio, self.seed)
        return select_blocks(self.step, self.count, self.ratio, self.schedule, self.seed)

    def _select_anew(self) -> None:
        self.engine.selected_anew()
        self.selected = self._select()
        inside = {id(parameter) for block in self.engine.blocks for parameter in block.parameters()}
        self.engine.around = [parameter for parameter in self._model.parameters() if id(parameter) not in inside]

    def treatment(self, index: int) -> Treatment:
        if index in self.selected:
            return "train"
        return "identity" if self.mode == "identity" else "exact"

    def record_norms(self, norms: Mapping[int, float]) -> None:
        """Takes the gradient norms of this step's blocks into the running ones; one that is not finite is left out."""
        for index, norm in norms.items():
            before = self.norms[index]
            if not math.isfinite(norm):
                continue
            self.norms[index] = norm if before is None else NORM_DECAY * before + (1 - NORM_DECAY) * norm

    def advance(self) -> None:
        """To the next selection: call it once per optimizer step, after all micro-batches' backward passes."""
        self.step += 1
        self._select_anew()

    def attach(self, optimizer: torch.optim.Optimizer, unselected_update: UnselectedUpdate = "momentum") -> None:
        """Every step of ``optimizer`` advances the selection, until ``detach`` or ``remove``.

        An optimizer that was attached before is detached.

        Args:
            optimizer: any of torch's over all of the blocks' trainable parameters, or accelerate's wrapper of one; not
                ``BlockAdamW``, which is told what is selected.
            unselected_update: "momentum": the blocks that are not selected are stepped with a gradient of zero, as LCSB
                does; "none": they are left as they are.
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
        """The optimizer that was attached no longer advances the selection."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "mode": self.mode,
            "ratio": self.ratio,
            "schedule": self.schedule,
            "seed": self.seed,
            "norms": list(self.norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was. ValueError if it is of another selection."""
        for key in ("mode", "ratio", "schedule", "seed"):
            if state[key] != getattr(self, key):
                raise ValueError(f"the saved selection has {key} {state[key]!r}, this one {getattr(self, key)!r}")
        if len(state["norms"]) != self.count:
            raise ValueError(f"the saved selection is of {len(state['norms'])} blocks, this one of {self.count}")
        self.norms = [None if norm is None else float(norm) for norm in state["norms"]]
        self.step = int(state["step"])
        self._select_anew()

    def remove(self) -> None:
        """Back to training every block; takes off the hooks that this manager put on."""
        self.detach()
        if getattr(self.engine.treatment, "__self__", None) is self:
            self.engine.treatment = lambda index: "train"
        if self._own:
            self.engine.remove()


def gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    """The 2-norm of all their gradients together; 0.0 without any."""
    found = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
    return math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient in found))
