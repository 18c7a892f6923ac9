"""Tile sizes of the Triton kernels: ``TileConfig``, and a default that always works.

A default is not the fastest. It fits every device (64 KiB of shared memory), spills no register, and needs
neither a search nor a table.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from .layout import CHUNK

Kernel = Literal["matmul", "matmul_dx", "embedding"]
KERNELS: tuple[Kernel, ...] = ("matmul", "matmul_dx", "embedding")

MIN_DOT = 16


@dataclass(frozen=True)
class TileConfig:
    """One launch configuration.

    Attributes:
        block_m: tokens per tile.
        block_n: out-features per tile (``matmul``), or per step of the reduction (``matmul_dx``).
        block_k: in-features per step of the reduction (``matmul``), or per tile (``matmul_dx``, ``embedding``);
            whole chunks of 64, of which a tile holds two planes of ``block_k // 2``.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.

    Raises:
        ValueError: a size that is no power of two, or too small for a tensor core.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        least = {"block_m": MIN_DOT, "block_n": MIN_DOT, "block_k": CHUNK, "num_warps": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < least.get(field.name, 1):
                raise ValueError(f"{field.name} must be an integer >= {least.get(field.name, 1)}, got {value!r}")
            if field.name in least and value & (value - 1):
                raise ValueError(f"{field.name} must be a power of two, got {value}")

    def launch_options(self) -> dict[str, Any]:
        """What a launch, or a compilation, needs besides the kernel's own arguments.

        The compiler may not fuse a multiplication with an addition: which it would fuse, and so the bits of a decoded
        weight, differs between its versions. Dots and explicit ``tl.fma`` are fused as ever.
        """
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


def power_of_two_at_least(value: int, least: int = MIN_DOT, most: int = 128) -> int:
    """The smallest power of two that is >= ``value``, held between ``least`` and ``most`` (themselves such powers)."""
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)


def default_config(kernel: Kernel, m: int, n: int, k: int, group_size: int, dtype: torch.dtype) -> TileConfig:
    """A configuration that works for every shape and on every device.

    Args:
        kernel: which kernel.
        m, n, k: tokens, out-features, in-features.
        group_size: columns of K that share a scale.
        dtype: the activations' dtype.

    Raises:
        ValueError: no such kernel.
    """
    if kernel == "embedding":
        return TileConfig(block_m=16, block_n=MIN_DOT, block_k=CHUNK, num_warps=4, num_stages=1)
    block_m = power_of_two_at_least(m, most=64)
    # Eight warps for 64 rows: where a device has no tensor cores, four would spill.
    num_warps = 8 if block_m == 64 else 4
    if kernel == "matmul":
        return TileConfig(block_m=block_m, block_n=64, block_k=CHUNK, num_warps=num_warps, num_stages=3)
    if kernel == "matmul_dx":
        return TileConfig(block_m=block_m, block_n=32, block_k=CHUNK, num_warps=num_warps, num_stages=3)
    raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}")
