"""Launch configurations of the Triton kernels: ``Problem``, ``TileConfig``, ``Panel``, and a default that always works.

The default is not the fastest configuration. It fits every device (64 KiB of shared memory), spills no register, and
needs neither a search nor a table.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from .layout import CHUNK
from .names import Form, Scheme

Kernel = Literal["matmul", "matmul_dx", "embedding"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
# Kernels with a choice of configurations, which tables hold.
TUNED: tuple[Kernel, ...] = ("matmul", "matmul_dx")

MIN_DOT = 16
# Most weights that one launch can take with one input: q, k and v.
MOST_MEMBERS = 3


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen for.

    Attributes:
        kernel: the kernel's name.
        m, n, k: tokens, out-features (of all members of a group together), in-features.
        scheme, group_size: the weight's.
        dtype: the activations'.
        bits: the width of the weight's codes, 4 or 8.
    """

    kernel: Kernel
    m: int
    n: int
    k: int
    scheme: Scheme = "symmetric"
    group_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    bits: int = 4

    @property
    def form(self) -> Form:
        return Form(self.scheme, self.group_size, self.bits)


@dataclass(frozen=True)
class TileConfig:
    """One launch configuration.

    Attributes:
        block_m: tokens per tile.
        block_n: out-features per tile (``matmul``), or per step of the reduction (``matmul_dx``).
        block_k: in-features per step of the reduction (``matmul``), or per tile (``matmul_dx``, ``embedding``). It is
            a multiple of 64; a tile holds two planes of ``block_k // 2`` columns.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        split: number of parts that the reduction is cut into. Each part has its own float32 partial result. A second
            pass adds them in order, so the result does not change from run to run.
        weight_left: the decoded weight is the left operand of the dot, and the kernel computes tiles of the transposed
            result. If false, it is the right operand (``matmul_dx`` only).
        scale_sums: scales multiply float32 sums over a group instead of weights (``matmul``, symmetric scheme).

    Raises:
        ValueError: a size that is no power of two, or too small for a tensor core.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    split: int = 1
    weight_left: bool = True
    scale_sums: bool = False

    def __post_init__(self) -> None:
        least = {"block_m": MIN_DOT, "block_n": MIN_DOT, "block_k": CHUNK, "num_warps": 1, "split": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("weight_left", "scale_sums"):
                if type(value) is not bool:
                    raise ValueError(f"{field.name} must be true or false, got {value!r}")
                continue
            if type(value) is not int or value < least.get(field.name, 1):
                raise ValueError(f"{field.name} must be an integer >= {least.get(field.name, 1)}, got {value!r:.100}")
            if field.name in least and value & (value - 1):
                raise ValueError(f"{field.name} must be a power of two, got {value!r:.100}")

    def suits(self, problem: Problem) -> bool:
        """Whether the problem's kernel can run with this configuration. Only sums within one group can be scaled."""
        if not self.scale_sums:
            return True
        within_group = problem.group_size >= self.block_k or (problem.group_size == 32 and self.block_k == CHUNK)
        return problem.kernel == "matmul" and problem.scheme == "symmetric" and within_group

    def launch_options(self) -> dict[str, Any]:
        """Options of a launch, or of a compilation, besides the kernel's own arguments.

        Fusing a multiplication with an addition is switched off, because the compiler's versions differ in what they
        fuse, and so in the bits of a decoded weight. Dots and explicit ``tl.fma`` are still fused.
        """
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Panel:
    """The route of a product whose weight is decoded panel by panel, which the vendor's library multiplies.

    Attributes:
        mib: most MiB that a panel takes in a 16-bit dtype; in float32 it takes twice that.

    Raises:
        ValueError: the size is no integer from 1 to 1024.
    """

    mib: int = 16

    def __post_init__(self) -> None:
        if type(self.mib) is not int or not 1 <= self.mib <= 1024:
            raise ValueError(f"panel_mib must be an integer from 1 to 1024, got {self.mib!r:.100}")

    @property
    def elements(self) -> int:
        """The most weights of a panel."""
        return self.mib << 19


# The panels that run where nothing was measured: they stay in a large second-level cache.
PANEL = Panel()


def power_of_two_at_least(value: int, least: int = MIN_DOT, most: int = 128) -> int:
    """The smallest power of two that is >= ``value``, clamped to ``least`` and ``most`` (powers of two themselves)."""
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)


def default_config(problem: Problem) -> TileConfig:
    """A configuration that works for every problem and on every device.

    Raises:
        ValueError: there is no such kernel.
    """
    if problem.kernel == "embedding":
        return TileConfig(block_m=16, block_n=MIN_DOT, block_k=CHUNK, num_warps=4, num_stages=1)
    block_m = power_of_two_at_least(problem.m, most=64)
    # Tiles of 64 tokens take eight warps, because four would spill registers on a device without tensor cores.
    num_warps = 8 if block_m == 64 else 4
    if problem.kernel == "matmul":
        return TileConfig(block_m=block_m, block_n=64, block_k=CHUNK, num_warps=num_warps, num_stages=3)
    if problem.kernel == "matmul_dx":
        return TileConfig(
            block_m=block_m, block_n=32, block_k=CHUNK, num_warps=num_warps, num_stages=3, weight_left=False
        )
    raise ValueError(f"kernel must be one of {KERNELS}, got {problem.kernel!r}")
