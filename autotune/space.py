"""The configurations that are worth compiling for a problem: tile shapes by number of tokens, cut by cheap rules."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from mebp_triton.kernels.configs import MIN_DOT, Problem, TileConfig, power_of_two_at_least

from .cost_model import NOMINAL, Device, grid

# (out-features (matmul) or in-features (matmul_dx) of the tile, step of the reduction, warps). Four warps hold the sums
# of small tiles; larger tiles need eight, because four would run out of registers.
MATMUL_SMALL = ((32, 128, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4))
MATMUL_LARGE = ((64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8))
DX_SMALL = ((64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4))
DX_LARGE = ((64, 32, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8))
SPLITS = (1, 2, 4, 8, 16)
# Up to so many tokens a launch is bound by the memory that the weights come from.
SMALL_M = 32
# Fewest steps in a part of a split reduction; a shorter one would not fill its pipeline.
MIN_STEPS = 4


def candidates(problem: Problem, target_sm: int) -> list[TileConfig]:
    """The configurations of a problem's kernel for a compute capability, in the same order every time.

    The panel route is not among them, since it has no configuration. It is always a candidate besides.

    Raises:
        ValueError: the kernel has no configurations to choose from, or the target is unknown.
    """
    if problem.kernel not in ("matmul", "matmul_dx"):
        raise ValueError(f"kernel must be matmul or matmul_dx, got {problem.kernel!r}")
    if target_sm not in NOMINAL:
        raise ValueError(f"target_sm must be one of {sorted(NOMINAL)}, got {target_sm}")
    device = NOMINAL[target_sm]
    forward, small = problem.kernel == "matmul", problem.m <= SMALL_M
    tiles = (MATMUL_SMALL if small else MATMUL_LARGE) if forward else (DX_SMALL if small else DX_LARGE)
    stages = (3, 4) if small else (2, 3)
    left = _operand_orders(problem, device)
    scaled_sums = (False, True) if forward and small else (False,)
    configs = []
    for block_m, (block_out, step, num_warps), depth, weight_left, sums in product(
        _token_blocks(problem.m, device), tiles, stages, left, scaled_sums
    ):
        block_n, block_k = (block_out, step) if forward else (step, block_out)
        base = TileConfig(block_m, block_n, block_k, num_warps, depth, weight_left=weight_left, scale_sums=sums)
        if base.suits(problem) and _within(problem, base):
            configs += [replace(base, split=split) for split in _splits(problem, base, device)]
    return configs


def _operand_orders(problem: Problem, device: Device) -> tuple[bool, ...]:
    """The values of ``weight_left`` to try. The forward kernel always has the weight on the left.

    For dX, the matrix instructions of sm_90 and sm_100 take a right operand from shared memory, into which the weight
    is decoded once. On the left it would have to be transposed in registers.
    """
    if problem.kernel == "matmul":
        return (True,)
    return (False,) if device.compute_capability in (90, 100) and problem.m > SMALL_M else (True, False)


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
