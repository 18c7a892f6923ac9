"""The second pass of a split reduction: partial results are added in order, so that all runs give the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import WEIGHTLESS

BLOCK = 1024


@triton.jit
def _sum_parts_kernel(parts_ptr, out_ptr, SIZE, stride_part, SPLIT: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """``out[i] = parts[0, i] + parts[1, i] + ...``.

    parts_ptr ``[SPLIT, SIZE]`` float32, whose rows are stride_part apart; out_ptr ``[SIZE]``.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < SIZE
    # [BLOCK_SIZE]
    total = tl.load(parts_ptr + offs, mask=mask, other=0.0)
    for _ in tl.static_range(1, SPLIT):
        parts_ptr += stride_part
        # [BLOCK_SIZE]
        total += tl.load(parts_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def parts_of(outs: Sequence[Tensor], split: int) -> list[Tensor]:
    """The outputs of a kernel: ``outs`` themselves or, with a split, the first part of each in one float32 buffer.

    The buffer holds the first parts of all outputs, then all second parts, and so on. So the distance between two parts
    is the same for each output, and a kernel adds it to whichever output it writes.
    """
    if split == 1:
        return list(outs)
    sizes = [out.numel() for out in outs]
    buffer = torch.empty((split * sum(sizes),), dtype=torch.float32, device=outs[0].device)
    return [buffer[sum(sizes[:index]) :] for index in range(len(sizes))]


def sum_parts(parts: Sequence[Tensor], outs: Sequence[Tensor], split: int) -> None:
    """Adds up the parts that ``parts_of`` made into the contiguous ``outs``, and rounds once to their dtype."""
    if split == 1:
        return
    stride_part = sum(out.numel() for out in outs)
    for part, out in zip(parts, outs, strict=True):
        size = out.numel()
        if size:
            operands = {"parts_ptr": part, "out_ptr": out, "SIZE": size, "stride_part": stride_part}
            given = operands | {"SPLIT": split, "BLOCK_SIZE": BLOCK}, {"num_warps": 4, "enable_fp_fusion": False}
            WEIGHTLESS.launch(_sum_parts_kernel, (-(-size // BLOCK),), (split,), operands, lambda given=given: given)
