"""The time for which the computation waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Waiting:
    """Seconds for which the computation has waited for data."""

    seconds: float = 0.0

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
