"""Rounds a changed matrix to the grid of an int4 weight without losing changes that are smaller than a step.

The nearest code of ``W + D`` is the code of ``W`` wherever ``D`` is smaller than half a step, as the changes of an
adapter are, so nearest rounding undoes them. Here a value between two levels becomes one of them at random, and the
nearer one more often, so that the mean is the value itself (stochastic rounding, arXiv 1502.02551). The changes of many
weights then add up to what they should in a product, and a weight that does not change keeps its code.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Int4Weight, middle_code, pack
from .reference import decode

CHUNK_ELEMENTS = 1 << 18
EXACT = 1e-5  # of the distance between two levels


class Rounded(NamedTuple):
    """A matrix on a grid.

    Attributes:
        weight: the matrix.
        error: ``||decoded - matrix|| / ||matrix||`` (0 for a matrix of zeros).
        outside: the part of the change from the grid's own weight, by squares, that lies outside of the groups' levels.
    """

    weight: Int4Weight
    error: float
    outside: float


def round_to_grid(matrix: Tensor, grid: Int4Weight) -> Rounded:
    """Rounds ``matrix`` ``[N, K]`` to the levels of ``grid``, whose scales, minimum and codebook are kept.

    The random numbers are drawn from a seed that depends on the grid alone: the same call gives the same codes. What
    lies outside of a group's levels becomes the nearest of them. Some rows are in memory at a time.

    Raises:
        ValueError: the shapes differ, or a value is not finite.
    """
    if tuple(matrix.shape) != grid.shape:
        raise ValueError(f"the matrix has shape {tuple(matrix.shape)}, the grid {grid.shape}")
    if not matrix.isfinite().all():
        raise ValueError("weight must be finite, got NaN or infinity")
    generator = torch.Generator().manual_seed(zlib.crc32(grid.packed[0].cpu().numpy().tobytes()))
    packed = torch.empty_like(grid.packed)
    whole, middle = replace(grid, packed=packed), middle_code(grid.bits)
    error = total = outside = changed = 0.0
    step = max(1, CHUNK_ELEMENTS // grid.in_features)
    for start in range(0, len(matrix), step):
        exact, rows = matrix[start : start + step].float(), grid.rows(start, start + step)
        codes, excess = _round_rows(exact, rows, generator)
        packed[start : start + step] = pack(codes, middle if grid.scheme == "symmetric" else 0, grid.bits)
        error += float((decode(whole.rows(start, start + step)) - exact).square_().sum())
        total += float(exact.double().square_().sum())
        outside += float(excess.double().square_().sum())
        changed += float((exact - decode(rows, torch.float32)).double().square_().sum())
    return Rounded(whole, (error / total) ** 0.5 if total else 0.0, min(1.0, outside / changed) if changed else 0.0)


def _round_rows(exact: Tensor, grid: Int4Weight, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The codes of some rows, uint8, and how far their values lie outside of the levels."""
    group = torch.arange(grid.in_features, device=exact.device) // grid.group_size
    scale, minimum = grid.float_scales().t()[:, group], grid.float_minimum()
    if minimum is not None:
        exact = exact - minimum.t()[:, group]
    levels = torch.arange(2.0**grid.bits, device=exact.device) if grid.codebook is None else grid.codebook
    if grid.scheme == "symmetric":
        levels = levels - middle_code(grid.bits)
    levels, code_of = levels.sort()  # the codebook of FP4 is in another order
    # A group with scale 0 has one level, and any code will do.
    value = torch.where(scale == 0, 0.0, exact / torch.where(scale == 0, 1.0, scale))
    below = (torch.searchsorted(levels, value, right=True) - 1).clamp_(0, len(levels) - 2)
    share = (value - levels[below]) / (levels[below + 1] - levels[below])
    # A value that is a level but for rounding errors is that level.
    share = torch.where((share - share.round()).abs() < EXACT, share.round(), share)
    drawn = torch.rand(value.shape, generator=generator).to(value.device)
    excess = value - value.clamp(float(levels[0]), float(levels[-1]))
    excess = torch.where(excess.abs() < EXACT, 0.0, excess) * scale
    return code_of[below + (drawn < share)].to(torch.uint8), excess
