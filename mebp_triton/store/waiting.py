"""The time for which the computation waits for data, and the weights of blocks that were brought in."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Waiting:
    """What bringing data in has taken.

    Attributes:
        seconds: for which the computation has waited for data.
        paged: bytes of blocks' weights that were brought in: made resident from a file, or copied to a device.
        experts: experts of mixtures that were brought in; ``paged`` has their bytes.
    """

    seconds: float = 0.0
    paged: int = 0
    experts: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While active, time counts as waiting."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def pop_seconds(self) -> float:
        """Returns the seconds so far; counting starts again at 0."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def pop_paged(self) -> int:
        """Returns the bytes so far; counting starts again at 0."""
        paged, self.paged = self.paged, 0
        return paged

    def count_experts(self, spans: Sequence[Sequence[tuple[int, int]]], experts: Iterable[int]) -> None:
        """Counts experts that were brought in, by where the bytes of each lie."""
        for expert in experts:
            self.experts += 1
            self.paged += sum(end - begin for begin, end in spans[expert])

    def pop_experts(self) -> int:
        """Returns the experts so far; counting starts again at 0."""
        experts, self.experts = self.experts, 0
        return experts
