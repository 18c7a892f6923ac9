"""LCSB (arXiv 2602.13073): which blocks a step backpropagates through, and how the gradient passes the others."""

from __future__ import annotations

import random
from typing import Any, Literal

from torch import nn

from .backprop import BlockEngine, Treatment
from .blocks import find_blocks

Mode = Literal["full", "identity", "exact", "freeze"]
MODES: tuple[Mode, ...] = ("full", "identity", "exact", "freeze")
Schedule = Literal["cyclic", "strided", "random"]
SCHEDULES: tuple[Schedule, ...] = ("cyclic", "strided", "random")


def select_blocks(step: int, count: int, ratio: float, schedule: Schedule, seed: int = 0) -> frozenset[int]:
    """The blocks selected at ``step``: ``max(1, round(ratio * count))`` of ``count``.

    cyclic: windows of neighbours, one after the other, around the end. strided: evenly spaced, shifted by one block a
    step. random: the blocks are shuffled and dealt out, so that every round of ``ceil(count / k)`` steps covers all;
    a pure function of seed and step. Every schedule covers every block.
    """
    size = min(count, max(1, round(ratio * count)))
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


class LayerCyclicManager:
    """Selects the blocks of a model that a step trains.

    Works on any transformers or PEFT model whose blocks hold trainable parameters; on a model that
    ``mebp_triton.load`` made, its block engine is used, on another one is put in (and ``remove`` takes it out again).

    Args:
        model: the model.
        ratio: the part of the blocks that is selected, in (0, 1].
        mode: "full" all blocks; "identity" the gradient passes the others unchanged; "exact" it passes them truly but
            their parameters get none; "freeze" only the topmost blocks are trained, always the same.
        schedule: see ``select_blocks``.
        seed: of the random schedule.
        blocks: the path of the block list, where it is not found by itself.

    Attributes:
        step: optimizer steps so far.
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
        self._own_engine = runtime is None
        self.engine: BlockEngine = BlockEngine(find_blocks(model, blocks)[1]) if runtime is None else runtime.engine
        self.engine.treatment = self.treatment

    @property
    def count(self) -> int:
        return len(self.engine.blocks)

    @property
    def selected(self) -> frozenset[int]:
        """The blocks that are trained at this step."""
        if self.mode == "full":
            return frozenset(range(self.count))
        if self.mode == "freeze":
            size = max(1, round(self.ratio * self.count))
            return frozenset(range(self.count - size, self.count))
        return select_blocks(self.step, self.count, self.ratio, self.schedule, self.seed)

    def treatment(self, index: int) -> Treatment:
        if index in self.selected:
            return "train"
        return "identity" if self.mode == "identity" else "exact"

    def advance(self) -> None:
        """To the next selection: call it once per optimizer step, after all micro-batches' backward passes."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "mode": self.mode,
            "ratio": self.ratio,
            "schedule": self.schedule,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was. ValueError if it is of another selection."""
        for key in ("mode", "ratio", "schedule", "seed"):
            if state[key] != getattr(self, key):
                raise ValueError(f"the saved selection has {key} {state[key]!r}, this one {getattr(self, key)!r}")
        self.step = int(state["step"])

    def remove(self) -> None:
        """Back to training every block; takes the engine out if this manager put it in."""
        self.engine.treatment = lambda index: "train"
        if self._own_engine:
            self.engine.remove()
