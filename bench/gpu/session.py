"""The run of a part of the suite: its device, its sizes, its time, and where its results are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from mebp_triton.autotune.timing import CudaTimer, Limits, Timer, WallTimer
from mebp_triton.system import strict_json

from .sizes import Sizes

Item = TypeVar("Item")
SECONDS_BETWEEN_SAVES = 2.0


@dataclass
class Session:
    """One part's run.

    Attributes:
        device: CUDA, or the CPU for a rehearsal.
        sizes: what to run on.
        deadline: a value of ``time.monotonic``; the part stops by itself before it.
        output: the suite's JSON file; other files go beside it.
        kept: where the part's results are written while it runs.
        results: JSON values.
        failures: the checks that did not hold.
    """

    device: torch.device
    sizes: Sizes
    deadline: float
    output: Path
    kept: Path
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    saved: float = -SECONDS_BETWEEN_SAVES

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is timed."""
        return self.sizes.dtypes[0]

    def timer(self) -> Timer:
        return CudaTimer(self.device) if self.on_gpu else WallTimer()

    def limits(self) -> Limits:
        return Limits.of(self.device) if self.on_gpu else Limits(1 << 14, 1 << 30)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def while_time(self, name: str, items: Sequence[Item], share: float = 1.0) -> Iterator[Item]:
        """Yields items while this share of the remaining time lasts, and records how many are left out.

        Args:
            name: under which ``results["left_out"]`` has their number.
        """
        stop = time.monotonic() + share * self.seconds_left()
        for done, item in enumerate(items):
            if time.monotonic() >= stop:
                self.results.setdefault("left_out", {})[name] = len(items) - done
                return
            yield item
            self.save()

    def fail(self, text: str) -> None:
        self.failures.append(text)

    def save(self, now: bool = False, error: str | None = None) -> None:
        """Writes the results so far; at most every few seconds, unless ``now``."""
        if now or time.monotonic() - self.saved >= SECONDS_BETWEEN_SAVES:
            strict_json.write_json(self.kept, {"results": self.results, "failures": self.failures, "error": error})
            self.saved = time.monotonic()
