"""Rotary embeddings (arXiv 2104.09864) of q and k in one launch, and of their gradients in another."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import power_of_two_at_least
from .launch import FLOAT_DTYPES, WEIGHTLESS
from .reference import fits_rope

# Elements of a program's tile, for each of the two halves that are rotated together.
TILE = 1024


@triton.jit
def _rotate(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    block,
    H,
    D,
    HALF,
    stride_xh,
    INVERSE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rotates a block of heads of one token: x_ptr ``[H, D]``, y_ptr ``[H, D]`` contiguous, the others ``[2·HALF]``."""
    dtype = x_ptr.dtype.element_ty
    offs_h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = (offs_h < H)[:, None]
    mask_d = offs_d < HALF
    mask = mask_h & mask_d[None, :]
    # [BLOCK_D] each
    cos_low = tl.load(cos_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos_ptr + HALF + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin_ptr + HALF + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin_low, sin_high = -sin_high, -sin_low
    x_ptrs = x_ptr + offs_h.to(tl.int64)[:, None] * stride_xh + offs_d[None, :]
    y_ptrs = y_ptr + offs_h.to(tl.int64)[:, None] * D + offs_d[None, :]
    # [BLOCK_H, BLOCK_D]
    low = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    # [BLOCK_H, BLOCK_D]
    high = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    by_cos_low, by_cos_high = low * cos_low, high * cos_high
    by_sin_low, by_sin_high = high * sin_low, low * sin_high
    if ROUND:
        by_cos_low, by_cos_high = by_cos_low.to(dtype).to(tl.float32), by_cos_high.to(dtype).to(tl.float32)
        by_sin_low, by_sin_high = by_sin_low.to(dtype).to(tl.float32), by_sin_high.to(dtype).to(tl.float32)
    tl.store(y_ptrs, (by_cos_low - by_sin_low).to(dtype), mask=mask)
    tl.store(y_ptrs + HALF, (by_cos_high + by_sin_high).to(dtype), mask=mask)
    for d0 in range(2 * HALF, D, BLOCK_D):
        mask_rest = mask_h & (d0 + offs_d < D)[None, :]
        tl.store(y_ptrs + d0, tl.load(x_ptrs + d0, mask=mask_rest, other=0.0), mask=mask_rest)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    T,
    HQ,
    HK,
    D,
    HALF,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_cb,
    stride_ct,
    stride_sb,
    stride_st,
    INVERSE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``low' = low·cos - high·sin``, ``high' = high·cos + low·sin`` for the halves of the first 2·HALF columns.

    q_ptr: ``[B, HQ, T, D]``. k_ptr: ``[B, HK, T, D]``. cos_ptr, sin_ptr: ``[B or 1, T, 2·HALF]``.
    q_out_ptr: ``[B, T, HQ, D]``, contiguous. k_out_ptr: ``[B, T, HK, D]``, contiguous.
    A program has one token, and a block of heads of q or of k.
    INVERSE: the transposed rotation, which a gradient needs. ROUND: products are rounded before they are added.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    b = token // T
    t = token % T
    cos_ptr += b * stride_cb + t * stride_ct
    sin_ptr += b * stride_sb + t * stride_st
    blocks_q = (HQ + BLOCK_H - 1) // BLOCK_H
    if block < blocks_q:
        q_ptr += b * stride_qb + t * stride_qt
        q_out_ptr += token * HQ * D
        _rotate(q_ptr, q_out_ptr, cos_ptr, sin_ptr, block, HQ, D, HALF, stride_qh, INVERSE, ROUND, BLOCK_H, BLOCK_D)
    else:
        block -= blocks_q
        k_ptr += b * stride_kb + t * stride_kt
        k_out_ptr += token * HK * D
        _rotate(k_ptr, k_out_ptr, cos_ptr, sin_ptr, block, HK, D, HALF, stride_kh, INVERSE, ROUND, BLOCK_H, BLOCK_D)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rope_triton(q, k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *rope_triton(dq, dk, *ctx.saved_tensors, inverse=True), None, None


def takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel can compute this: ``rope`` has no gradient for cos and sin."""
    return fits_rope(q, k, cos, sin) and q.dtype in FLOAT_DTYPES


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``rope_triton``, differentiable in q and k, of tensors of which ``takes`` holds."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rope.apply(q, k, cos, sin)  # type: ignore[no-any-return]
    return rope_triton(q, k, cos, sin)


def rope_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Rotates q and k: ``x · cos + (-high, low) · sin``, where low and high are the halves of the first R columns.

    Args:
        q: ``[B, H, T, D]`` float32, float16 or bfloat16, any strides. k: ``[B, H', T, D]``, likewise.
        cos, sin: ``[B or 1, T, R]``, R even and at most D, in q's dtype or float32. In q's dtype, the two products are
            rounded to it before they are added, as torch does.
        inverse: the gradient of the rotation: its transpose. Nothing is rounded before the sum.

    Returns:
        q and k rotated, in their shapes and dtype. In memory, heads come after tokens, ``[B, T, H, D]``, as the layers
        before attention write them; so a gradient goes back to these without a copy.
    """
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    (batch, heads, tokens, columns), heads_k = q.shape, k.shape[1]
    q_out = torch.empty((batch, tokens, heads, columns), dtype=q.dtype, device=q.device)
    k_out = torch.empty((batch, tokens, heads_k, columns), dtype=k.dtype, device=k.device)
    if q_out.numel() or k_out.numel():
        half, shared = cos.shape[-1] // 2, cos.shape[0] == 1
        block_d = power_of_two_at_least(half, most=1 << 30)
        block_h = power_of_two_at_least(max(heads, heads_k), least=1, most=max(TILE // block_d, 1))
        blocks = -(-heads // block_h) - (-heads_k // block_h)

        def new() -> tuple[dict[str, Any], dict[str, Any]]:
            strides = {
                f"stride_{name}{axis}": tensor.stride(place)
                for name, tensor, axes in (("q", q, "bht"), ("k", k, "bht"), ("c", cos, "bt"), ("s", sin, "bt"))
                for place, axis in enumerate(axes)
            }
            if shared:
                strides |= {"stride_cb": 0, "stride_sb": 0}
            arguments = {
                **operands,
                **{"T": tokens, "HQ": heads, "HK": heads_k, "D": columns, "HALF": half},
                **strides,
                "INVERSE": inverse,
                "ROUND": cos.dtype == q.dtype != torch.float32 and not inverse,
                "BLOCK_H": block_h,
                "BLOCK_D": block_d,
            }
            # Torch's operations, one after the other, do not fuse a product and a sum either.
            return arguments, {"num_warps": 4, "enable_fp_fusion": False}

        operands = {"q_ptr": q, "k_ptr": k, "cos_ptr": cos, "sin_ptr": sin, "q_out_ptr": q_out, "k_out_ptr": k_out}
        WEIGHTLESS.launch(_rope_kernel, (batch * tokens, blocks), (inverse, shared), operands, new)
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
