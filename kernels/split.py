"""The second pass of a split reduction: adds float32 partial results in order, so that no run differs from another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _sum_parts_kernel(parts_ptr, out_ptr, SIZE, SPLIT: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """``out[i] = parts[0, i] + parts[1, i] + ...``: parts_ptr ``[SPLIT, SIZE]`` float32, out_ptr ``[SIZE]``."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < SIZE
    # [BLOCK_SIZE]
    total = tl.load(parts_ptr + offs, mask=mask, other=0.0)
    for _ in tl.static_range(1, SPLIT):
        parts_ptr += SIZE
        # [BLOCK_SIZE]
        total += tl.load(parts_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def parts_buffer(out: Tensor, split: int) -> Tensor:
    """Where a kernel writes: ``out`` itself, or ``[split * out.numel()]`` in float32."""
    if split == 1:
        return out
    return torch.empty((split * out.numel(),), dtype=torch.float32, device=out.device)


def sum_parts(parts: Tensor, out: Tensor, split: int) -> None:
    """Adds ``parts``, as ``parts_buffer`` made them, into ``out``, rounded once to its dtype."""
    if split == 1:
        return
    size = out.numel()
    with torch.cuda.device_of(out):
        _sum_parts_kernel[(triton.cdiv(size, BLOCK),)](parts, out, size, SPLIT=split, BLOCK_SIZE=BLOCK, num_warps=4)
