"""How sides of a comparison are timed: what a side is, whose turn it is, and how near their results must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mebp_triton.autotune.measure import SAMPLE_US, WINDOW
from mebp_triton.autotune.timing import Timer

# By dtype, the most that two correct results differ, relative to their norm.
SAME = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
MOST_COPIES = 256

# A result that is not looked at here.
Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Side:
    """One way to compute a product.

    Attributes:
        calls: one per copy of the weight, in memory of its own.
        group: sides of one group compute the same.
    """

    calls: list[Call]
    group: str


def missing_peers() -> dict[str, str]:
    """The peers that cannot be compared with, and why."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a build for another CUDA raises all sorts of things
        return {"bitsandbytes": f"{type(error).__name__}: {error}"}
    return {}


def in_turns(sides: dict[str, list[Call]], x: Tensor, timer: Timer, samples: int) -> dict[str, list[float]]:
    """Samples of every side in microseconds per call. The sides take turns, so that a changing clock meets them all."""
    windows = {name: Window(calls, x) for name, calls in sides.items()}
    for window in windows.values():
        window.warm(timer)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(samples):
        for name, window in windows.items():
            found[name].append(window.sample(timer))
    return found


class Window:
    """A run of calls of one side, each on the next copy of its weight; one sample times the whole run."""

    def __init__(self, calls: Sequence[Call], x: Tensor) -> None:
        self.calls, self.x, self.next, self.count = calls, x, 0, 2

    def run(self) -> None:
        for _ in range(self.count):
            self.calls[self.next](self.x)
            self.next = (self.next + 1) % len(self.calls)

    def warm(self, timer: Timer) -> None:
        timer(self.run)
        once_us = timer(self.run) / self.count
        self.count = max(1, min(int(SAMPLE_US / max(once_us, 1e-3)), WINDOW))
        timer(self.run)

    def sample(self, timer: Timer) -> float:
        return timer(self.run) / self.count
