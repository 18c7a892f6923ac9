"""The configurations that are worth compiling for a problem: tile shapes by number of tokens, cut by cheap rules."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from mebp_triton.kernels.configs import MIN_DOT, Problem, TileConfig, default_config, power_of_two_at_least

from .cost_model import NOMINAL, Device, grid

# A tile's shape: (out-features (matmul) or in-features (matmul_dx) of the tile, step of the reduction, warps).
Shape = tuple[int, int, int]
MATMUL_SMALL: tuple[Shape, ...] = (
    (32, 128, 4),
    (64, 64, 4),
    (64, 128, 4),
    (64, 256, 4),
    (128, 64, 4),
    (128, 64, 8),
    (128, 128, 4),
    (256, 64, 4),
)
MATMUL_LARGE: tuple[Shape, ...] = ((64, 64, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8))
DX_SMALL: tuple[Shape, ...] = ((64, 64, 4), (128, 32, 2), (128, 64, 2), (128, 64, 4))
DX_LARGE: tuple[Shape, ...] = ((64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 32, 8), (128, 64, 4), (128, 64, 8))
# Products without tensor cores hold both operands of a thread in registers, and larger tiles would spill.
DX_SMALL_PLAIN: tuple[Shape, ...] = ((64, 32, 4), (128, 32, 4))
DX_LARGE_PLAIN: tuple[Shape, ...] = ((64, 32, 8),)
# Compute capabilities whose tensor cores are so fast that shared memory is the limit of most tiles of many tokens. The
# tiles in whose trips nothing takes more than 1.4 times as long as the tensor cores, by the tile's tokens.
FAST_TENSOR_CORES = (80, 87)
MATMUL_BALANCED: dict[int, tuple[Shape, ...]] = {
    64: ((128, 64, 4), (128, 64, 8)),
    128: ((64, 64, 4), (128, 64, 8)),
}
DX_BALANCED: dict[int, tuple[Shape, ...]] = {
    64: ((64, 32, 2), (128, 32, 4), (128, 64, 4)),
    128: ((64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 32, 8), (128, 64, 8)),
}
SPLITS = (1, 2, 4, 8, 16)
# Up to so many tokens a launch is bound by the memory that the weights come from.
SMALL_M = 32
# Fewest steps in a part of a split reduction; a shorter one would not fill its pipeline.
MIN_STEPS = 4


def candidates(problem: Problem, target_sm: int) -> list[TileConfig]:
    """The configurations of a problem's kernel for a compute capability, in the same order every time.

    The panel route is not among them, since it has no configuration. It is always a candidate besides. Where every tile
    is larger than the problem, the default is the one candidate.

    Raises:
        ValueError: the kernel has no configurations to choose from, or the target is unknown.
    """
    if problem.kernel not in ("matmul", "matmul_dx"):
        raise ValueError(f"kernel must be matmul or matmul_dx, got {problem.kernel!r}")
    if target_sm not in NOMINAL:
        raise ValueError(f"target_sm must be one of {sorted(NOMINAL)}, got {target_sm}")
    device = NOMINAL[target_sm]
    forward, small = problem.kernel == "matmul", problem.m <= SMALL_M
    stages = (3, 4) if small else (2, 3)
    left = _weight_left(problem, device)
    scaled_sums = (False, True) if forward and small else (False,)
    configs = []
    for block_m in _token_blocks(problem.m, device):
        tiles = _tiles(problem, block_m, device)
        for (block_out, step, num_warps), depth, sums in product(tiles, stages, scaled_sums):
            block_n, block_k = (block_out, step) if forward else (step, block_out)
            base = TileConfig(block_m, block_n, block_k, num_warps, depth, weight_left=left, scale_sums=sums)
            if base.suits(problem) and _within(problem, base):
                configs += [replace(base, split=split) for split in _splits(problem, base, device)]
    return configs or [default_config(problem)]


def _tiles(problem: Problem, block_m: int, device: Device) -> tuple[Shape, ...]:
    """The shapes to try with so many tokens in a tile."""
    forward, small = problem.kernel == "matmul", problem.m <= SMALL_M
    plain = device.compute_capability < 80 or problem.dtype == torch.float32
    if forward and small:
        return MATMUL_SMALL
    if plain and not forward:
        return DX_SMALL_PLAIN if small else DX_LARGE_PLAIN
    if small:
        return DX_SMALL
    if device.compute_capability in FAST_TENSOR_CORES and not plain:
        return (MATMUL_BALANCED if forward else DX_BALANCED).get(block_m, ())
    return MATMUL_LARGE if forward else DX_LARGE


def _weight_left(problem: Problem, device: Device) -> bool:
    """Whether the decoded weight is the left operand, as it always is in the forward kernel.

    For dX, the matrix instructions of sm_90 and sm_100 take a right operand from shared memory for all warps, and are
    not there for fewer than 64 rows on the left. Elsewhere both orders cost the same, and the left one fewer registers.
    """
    return problem.kernel == "matmul" or device.compute_capability not in (90, 100) or problem.m <= SMALL_M


def _token_blocks(m: int, device: Device) -> list[int]:
    """Tokens per tile to try: the smallest tile that holds all, and half of it; from 129 tokens on the large ones."""
    largest = 256 if device.compute_capability >= 90 and device.max_warps == 64 else 128
    block = power_of_two_at_least(m, most=largest)
    blocks = {block, max(block // 2, MIN_DOT)} if m <= 128 else {128, 64, largest}
    return sorted(blocks)


def _within(problem: Problem, config: TileConfig) -> bool:
    """Whether the tile is no larger than the problem, and a program's sums fit into registers."""
    sums = config.block_m * (config.block_n if problem.kernel == "matmul" else config.block_k)
    fits = config.block_n <= power_of_two_at_least(problem.n, most=256) and config.block_k <= max(problem.k, 64)
    return fits and sums <= 128 * 32 * config.num_warps


def _splits(problem: Problem, config: TileConfig, device: Device) -> list[int]:
    """The splits to try: 1, and larger ones as long as half as many parts would leave multiprocessors idle."""
    programs, steps = grid(problem, config)
    return [
        split for split in SPLITS if split == 1 or (programs * split // 2 < device.sms and steps >= split * MIN_STEPS)
    ]
