"""Clocks that say how long something takes on a device, and the limits of a measurement there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Runs something and returns how many microseconds that took on the device.
Timer = Callable[[Callable[[], object]], float]


class WallTimer:
    """The wall clock, for devices that run every call at once (a CPU)."""

    def __call__(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6


class CudaTimer:
    """The time between two events on a CUDA device.

    Launching a small kernel takes longer than running it. So the device is made to wait until all launches are queued.
    """

    CYCLES_PER_US = 2_000  # at least every device's clock, so that the wait is long enough
    LONGEST_US = 20_000.0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_us = 0.0

    def __call__(self, run: Callable[[], object]) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(1.5 * self.host_us * self.CYCLES_PER_US))
            start.record()
            self.host_us = min(WallTimer()(run), self.LONGEST_US)
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e3


@dataclass(frozen=True)
class Limits:
    """Limits of measuring on a device.

    Attributes:
        cache_bytes: its second-level cache.
        memory_bytes: memory that measuring may use.
    """

    cache_bytes: int
    memory_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """The limits of a CUDA device. Half of its free memory may be used, since others use it too (or the host)."""
        free, _ = torch.cuda.mem_get_info(device)
        return cls(torch.cuda.get_device_properties(device).L2_cache_size, free // 2)
