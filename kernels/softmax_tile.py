"""One kernel that updates the running softmax of the one-pass cross-entropy by a tile of logits.

In plain torch a tile costs some twelve launches, each of which reads or writes the tile's logits. The kernel reads them
twice and writes the probabilities once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .workspace import is_traced

if TYPE_CHECKING:
    from .running_softmax import RunningSoftmax


BLOCK_V = 1024


@triton.jit
def _softmax_tile_kernel(
    z_ptr,
    slope_ptr,
    targets_ptr,
    maximum_ptr,
    total_ptr,
    at_target_ptr,
    target_slope_ptr,
    argmax_ptr,
    shrink_ptr,
    START,
    V,
    stride_zm,
    HAS_SLOPE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``m' = max(m, z)``; ``shrink = exp(m - m')``; ``l' = l·shrink + sum exp(z - m')``; one row per program.

    z_ptr: ``[rows, V]`` logits of rows START to START + V of the head; they become ``exp(z - m')``.
    slope_ptr: ``[rows, V]`` float32, contiguous: the chain's derivatives.
    maximum_ptr (m), total_ptr (l), at_target_ptr, target_slope_ptr, shrink_ptr: ``[rows]`` float32.
    targets_ptr, argmax_ptr: ``[rows]`` int64.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zm
    offs_v = tl.arange(0, BLOCK_V)
    before = tl.load(maximum_ptr + row)
    top = before
    place = tl.load(argmax_ptr + row)
    target = tl.load(targets_ptr + row) - START
    at_target = 0.0
    for v0 in range(0, V, BLOCK_V):
        # [BLOCK_V]
        z = tl.load(z_ptr + v0 + offs_v, mask=v0 + offs_v < V, other=float("-inf")).to(tl.float32)
        highest, index = tl.max(z, axis=0, return_indices=True)
        place = tl.where(highest > top, (START + v0 + index).to(tl.int64), place)
        top = tl.maximum(top, highest)
        at_target += tl.sum(tl.where(v0 + offs_v == target, z, 0.0), axis=0)

    if (target >= 0) & (target < V):
        tl.store(at_target_ptr + row, at_target)
        if HAS_SLOPE:
            tl.store(target_slope_ptr + row, tl.load(slope_ptr + row * V + target))

    added = tl.full((BLOCK_V,), 0.0, tl.float32)
    for v0 in range(0, V, BLOCK_V):
        mask = v0 + offs_v < V
        # [BLOCK_V]
        z = tl.load(z_ptr + v0 + offs_v, mask=mask, other=float("-inf")).to(tl.float32)
        p = tl.exp(z - top)
        added += p
        tl.store(z_ptr + v0 + offs_v, p.to(z_ptr.dtype.element_ty), mask=mask)
    shrink = tl.exp(before - top)
    tl.store(shrink_ptr + row, shrink)
    tl.store(total_ptr + row, tl.load(total_ptr + row) * shrink + tl.sum(added, axis=0))
    tl.store(maximum_ptr + row, top)
    tl.store(argmax_ptr + row, place)


def update_softmax(softmax: RunningSoftmax, z: Tensor, slope: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
    """Does what ``RunningSoftmax.update`` does, for z ``[rows, V]`` in any float dtype and a softmax in float32."""
    rows, tile = z.shape
    shrink = torch.empty((rows, 1), dtype=torch.float32, device=z.device)
    if is_traced(z):
        return z, shrink
    with torch.cuda.device_of(z):
        _softmax_tile_kernel[(rows,)](
            z,
            slope,
            softmax.targets,
            softmax.maximum,
            softmax.total,
            softmax.at_target,
            softmax.target_slope,
            softmax.argmax,
            shrink,
            start,
            tile,
            z.stride(0),
            HAS_SLOPE=slope is not None,
            BLOCK_V=BLOCK_V,
            num_warps=4,
            # Named because the default is not the same in all versions of Triton. This is the older ones', under which
            # all results so far were computed.
            enable_fp_fusion=True,
        )
    return z, shrink
