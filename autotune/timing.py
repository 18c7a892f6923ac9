"""Clocks: how long something takes on a device, and what a measurement there may use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Runs something some times and says how many microseconds that took on the device.
Timer = Callable[[Callable[[], object]], float]


class WallTimer:
    """The clock on the wall, for devices that run what they are told at once (a CPU)."""

    def __call__(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6


class CudaTimer:
    """The time between two events on a CUDA device.

    To launch a small kernel takes longer than to run it. So the device waits first, until all is queued.
    """

    CYCLES_PER_US = 2_000  # no less than any device's clock: it waits long enough
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
    """What a device has: ``cache_bytes`` of L2, and ``memory_bytes`` that measuring may use."""

    cache_bytes: int
    memory_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """As the device says; half of what is free, as others share it (all of a small device does)."""
        free, _ = torch.cuda.mem_get_info(device)
        return cls(torch.cuda.get_device_properties(device).L2_cache_size, free // 2)
