"""The best that a device can do: how fast it copies memory, and how fast it multiplies large matrices."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import Limits, Timer


@dataclass(frozen=True)
class Ceilings:
    """The best rates of a device, as measured or as its data sheet gives them.

    Attributes:
        gb_s: bytes read and written while copying memory, in 10^9 per second.
        tflop_s: floating-point operations of a large matrix product, in 10^12 per second, by the name of the dtype.
    """

    gb_s: float
    tflop_s: dict[str, float]


def measure_copy_gb_s(device: torch.device, timer: Timer, limits: Limits) -> float:
    """Measures the rate of copying a buffer that is far larger than the cache."""
    size = min(max(1 << 20, 16 * limits.cache_bytes), 1 << 30, limits.memory_bytes // 2)
    # The bytes are random, because some devices move zeros faster.
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_us(timer, lambda: target.copy_(source)) / 1e3


def measure_matmul_tflop_s(device: torch.device, timer: Timer, limits: Limits, dtype: torch.dtype) -> float:
    """Measures the rate of multiplying square matrices, 8192 wide or as wide as memory allows, but 256 on a CPU."""
    size = 256 if device.type == "cpu" else 8192
    while 4 * size * size * dtype.itemsize > limits.memory_bytes:
        size //= 2
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _median_us(timer, lambda: torch.mm(left, right, out=out)) / 1e6


def _median_us(timer: Timer, run: Callable[[], object]) -> float:
    timer(run)
    return statistics.median(timer(run) for _ in range(7))
