"""RMSNorm (arXiv 1910.07467) over the last dimension as one kernel, and its backward pass as another.

Modelling code writes it as a chain of some seven small operations. The kernel rounds where such a chain rounds, and
``style`` says where that is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import power_of_two_at_least
from .launch import FLOAT_DTYPES, WEIGHTLESS
from .reference import NormStyle, fits_norm

# A row is one tile: it is read once and stays in registers.
MOST_COLUMNS = 16_384
# Elements of a program's tile, if its rows are short.
TILE = 2048


@triton.jit
def _scale(weight_ptr, offs_k, mask_k, OFFSET: tl.constexpr):
    """``[1, BLOCK_K]`` float32: the weight, or the weight plus one."""
    scale = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if OFFSET:
        scale += 1.0
    return scale[None, :]


@triton.jit
def _load_rows(x_ptr, M, K, stride_xm, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The program's rows: their numbers, the columns, the masks of columns and of both, and x in float32."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    mask = (offs_m < M)[:, None] & mask_k[None, :]
    rows_m = offs_m.to(tl.int64)[:, None]
    # [BLOCK_M, BLOCK_K]
    x = tl.load(x_ptr + rows_m * stride_xm + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    return rows_m, offs_k, mask_k, mask, x


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    M,
    K,
    stride_xm,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y = w · x / sqrt(mean(x²) + EPS)``, row by row; BLOCK_M rows per program.

    x_ptr: ``[M, K]``. weight_ptr: ``[K]``, contiguous. y_ptr: ``[M, K]``, contiguous.
    OFFSET: the factor is ``1 + w``. ROUND: the normalised row is rounded to x's dtype before it is multiplied.
    """
    rows_m, offs_k, mask_k, mask, x = _load_rows(x_ptr, M, K, stride_xm, BLOCK_M, BLOCK_K)
    normalised = x * tl.rsqrt(tl.sum(x * x, axis=1) / K + EPS)[:, None]
    if ROUND:
        normalised = normalised.to(x_ptr.dtype.element_ty).to(tl.float32)
    y = normalised * _scale(weight_ptr, offs_k, mask_k, OFFSET)
    tl.store(y_ptr + rows_m * K + offs_k[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_dx_kernel(
    x_ptr,
    weight_ptr,
    dy_ptr,
    dx_ptr,
    M,
    K,
    stride_xm,
    stride_dym,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dx = (g - n · mean(g · n)) / sqrt(mean(x²) + EPS)`` with ``g = w · dy`` and n, the normalised row.

    dy_ptr: ``[M, K]``. dx_ptr: ``[M, K]``, contiguous. ``_rms_norm_kernel`` describes the others. Nothing is rounded
    before dx is.
    """
    rows_m, offs_k, mask_k, mask, x = _load_rows(x_ptr, M, K, stride_xm, BLOCK_M, BLOCK_K)
    # [BLOCK_M, BLOCK_K]
    dy = tl.load(dy_ptr + rows_m * stride_dym + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / K + EPS)[:, None]
    normalised = x * factor
    g = dy * _scale(weight_ptr, offs_k, mask_k, OFFSET)
    dx = factor * (g - normalised * (tl.sum(g * normalised, axis=1) / K)[:, None])
    tl.store(dx_ptr + rows_m * K + offs_k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> tuple[Tensor, list[int]]:
    """``x`` as rows ``[M, K]``, without a copy where its memory allows that, and the order of its dimensions in them.

    It is x itself where that is contiguous.

    Heads of attention come as a transposed view. Rows in the order of memory keep a result laid out like its input,
    and what was no copy before the transposition is none after it. No order stands for that of x.
    """
    if x.is_contiguous():
        return x, []
    order = sorted(range(x.dim() - 1), key=lambda axis: -x.stride(axis))
    rows = x.permute(*order, -1).reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous(), order


def _like(rows: Tensor, x: Tensor, order: list[int]) -> Tensor:
    """``rows`` ``[M, K]`` in the shape of ``x``."""
    if not order:
        return rows if rows.shape == x.shape else rows.view(x.shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return rows.view(*(x.shape[axis] for axis in order), x.shape[-1]).permute(*inverse, -1)


def _row_stride(rows: Tensor) -> int:
    return rows.shape[-1] if rows.is_contiguous() else rows.stride(0)


def _launch(
    kernel: Any, operands: dict[str, Any], k: int, eps: float, style: NormStyle, others: Callable[[], dict[str, Any]]
) -> None:
    """Launches a kernel on rows of K elements. others: its arguments besides those that both kernels have."""

    def new() -> tuple[dict[str, Any], dict[str, Any]]:
        rows = {"K": k, "stride_xm": _row_stride(operands["x_ptr"]), "EPS": eps, "OFFSET": style == "offset"}
        return {**operands, **rows, **blocks, **others()}, options

    blocks, options = _blocks_and_options(k)
    m = operands["x_ptr"].numel() // k
    operands["M"] = m
    WEIGHTLESS.launch(kernel, (-(-m // blocks["BLOCK_M"]),), (k, eps, style), operands, new)


@functools.lru_cache(maxsize=64)
def _blocks_and_options(columns: int) -> tuple[dict[str, Any], dict[str, Any]]:
    block_k = power_of_two_at_least(columns, most=MOST_COLUMNS)
    block_m = max(TILE // block_k, 1)
    # Torch's operations, one after the other, do not fuse a product and a sum either.
    options = {"num_warps": min(max(block_m * block_k // 512, 4), 16), "enable_fp_fusion": False}
    return {"BLOCK_M": block_m, "BLOCK_K": block_k}, options


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.style = eps, style
        return rms_norm_triton(x, weight, eps, style)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return rms_norm_dx_triton(dy, x, weight, ctx.eps, ctx.style), None, None, None


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can compute this: ``rms_norm`` has no gradient for the weight."""
    return fits_norm(x, weight) and x.dtype in FLOAT_DTYPES and weight.numel() <= MOST_COLUMNS


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle = "twice") -> Tensor:
    """``rms_norm_triton``, differentiable in ``x``, of which and of the weight ``takes`` holds."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, weight, eps, style)  # type: ignore[no-any-return]
    return rms_norm_triton(x, weight, eps, style)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, style: NormStyle = "twice") -> Tensor:
    """Computes ``y = w · x / sqrt(mean(x²) + eps)`` along the last dimension, in float32.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16, any strides.
        weight: ``[K]`` in x's dtype.
        eps: is added to the mean of squares.
        style: "twice" rounds the normalised row to x's dtype, and again when it is multiplied by the weight, as Llama
            does; "once" rounds at the end only (OLMo 2), and so does "offset", whose factor is ``1 + w`` (Gemma).

    Returns:
        ``[..., K]`` in x's dtype. Its memory has the order of x's.
    """
    rows, order = _rows(x)
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        operands = {"x_ptr": rows, "weight_ptr": weight.contiguous(), "y_ptr": y}
        _launch(_rms_norm_kernel, operands, x.shape[-1], eps, style, lambda: {"ROUND": style == "twice"})
    return _like(y, x, order)


def rms_norm_dx_triton(dy: Tensor, x: Tensor, weight: Tensor, eps: float, style: NormStyle = "twice") -> Tensor:
    """Computes the gradient of ``rms_norm_triton`` with respect to x.

    Args:
        dy: ``[..., K]`` in x's dtype, any strides. The others are those of the forward pass.

    Returns:
        ``[..., K]`` in x's dtype. Its memory has the order of x's.
    """
    rows, order = _rows(x)
    dy_rows = dy.permute(*order, -1) if order else dy
    if not dy_rows.is_contiguous():
        dy_rows = dy_rows.reshape(-1, dy.shape[-1])
        dy_rows = dy_rows if dy_rows.stride(1) == 1 else dy_rows.contiguous()
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        operands = {"x_ptr": rows, "weight_ptr": weight.contiguous(), "dy_ptr": dy_rows, "dx_ptr": dx}
        others = functools.partial(dict, stride_dym=_row_stride(dy_rows))
        _launch(_rms_norm_dx_kernel, operands, x.shape[-1], eps, style, others)
    return _like(dx, x, order)
