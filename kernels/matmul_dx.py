"""``dX = dY·W (+ LoRA)`` straight from packed 4-bit weights: kernel, launcher.

The packing is that of the forward pass. Its two planes of columns become two accumulators, stored to runs of
neighbouring columns, so nothing is interleaved or transposed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import TileConfig, default_config, power_of_two_at_least
from .layout import Int4Weight
from .matmul import check_operand, load_planes, weight_arguments


@triton.jit
def _matmul_dx_kernel(
    dy_ptr,
    packed_ptr,
    scales_ptr,
    minimum_ptr,
    codebook_ptr,
    g_ptr,
    a_ptr,
    dx_ptr,
    M,
    N,
    K,
    R,
    stride_dym,
    stride_dyn,
    stride_pn,
    stride_pj,
    stride_sg,
    stride_sn,
    stride_zg,
    stride_zn,
    stride_gm,
    stride_gr,
    stride_ar,
    stride_ak,
    stride_dxm,
    stride_dxk,
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    HAS_LORA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``dX = dY·W + g·a``, one tile of dX per program.

    dy_ptr ``[M, N]``; packed_ptr, scales_ptr, minimum_ptr, codebook_ptr: the weight ``W[N, K]``, see ``load_planes``;
    g_ptr ``[M, R]`` (scaled ``dY·B``); a_ptr ``[R, K]``; dx_ptr ``[M, K]``.
    Sums are kept in float32 and rounded once.
    """
    pid = tl.program_id(0)
    # Neighbouring programs share a strip of the weight.
    blocks_m = (M + BLOCK_M - 1) // BLOCK_M
    offs_m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = (pid // blocks_m) * BLOCK_K
    mask_m = offs_m < M
    rows_m = offs_m.to(tl.int64)
    offs_j = tl.arange(0, BLOCK_K // 2)
    # The columns of the low plane; those of the high plane are 32 further on.
    offs_k = k0 + offs_j // 32 * 64 + offs_j % 32
    columns = offs_k.to(tl.int64)
    mask_low = offs_k < K
    mask_high = offs_k + 32 < K
    dtype = dy_ptr.dtype.element_ty

    acc_low = tl.full((BLOCK_M, BLOCK_K // 2), 0.0, tl.float32)
    acc_high = tl.full((BLOCK_M, BLOCK_K // 2), 0.0, tl.float32)
    for n0 in range(0, N, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        # [BLOCK_M, BLOCK_N]
        dy = tl.load(
            dy_ptr + rows_m[:, None] * stride_dym + offs_n.to(tl.int64)[None, :] * stride_dyn,
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        )
        # Columns from K on are computed and not stored: they touch no other column.
        w_low, w_high = load_planes(
            packed_ptr,
            scales_ptr,
            minimum_ptr,
            codebook_ptr,
            offs_n,
            mask_n,
            k0,
            K,
            stride_pn,
            stride_pj,
            stride_sg,
            stride_sn,
            stride_zg,
            stride_zn,
            GROUP,
            HAS_MINIMUM,
            HAS_CODEBOOK,
            False,
            BLOCK_K,
            dtype,
        )
        acc_low = tl.dot(dy, w_low, acc_low, input_precision="ieee")
        acc_high = tl.dot(dy, w_high, acc_high, input_precision="ieee")

    if HAS_LORA:
        for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
            offs_r = r0 + tl.arange(0, BLOCK_R)
            mask_r = offs_r < R
            # [BLOCK_M, BLOCK_R]
            g = tl.load(
                g_ptr + rows_m[:, None] * stride_gm + offs_r[None, :] * stride_gr,
                mask=mask_m[:, None] & mask_r[None, :],
                other=0.0,
            ).to(dtype)
            a_ptrs = a_ptr + offs_r.to(tl.int64)[:, None] * stride_ar + columns[None, :] * stride_ak
            # [BLOCK_R, BLOCK_J]
            a_low = tl.load(a_ptrs, mask=mask_r[:, None] & mask_low[None, :], other=0.0)
            acc_low = tl.dot(g, a_low.to(dtype), acc_low, input_precision="ieee")
            # [BLOCK_R, BLOCK_J]
            a_high = tl.load(a_ptrs + 32 * stride_ak, mask=mask_r[:, None] & mask_high[None, :], other=0.0)
            acc_high = tl.dot(g, a_high.to(dtype), acc_high, input_precision="ieee")

    dx_ptrs = dx_ptr + rows_m[:, None] * stride_dxm + columns[None, :] * stride_dxk
    out_dtype = dx_ptr.dtype.element_ty
    tl.store(dx_ptrs, acc_low.to(out_dtype), mask=mask_m[:, None] & mask_low[None, :])
    tl.store(dx_ptrs + 32 * stride_dxk, acc_high.to(out_dtype), mask=mask_m[:, None] & mask_high[None, :])


def matmul_dx_arguments(
    dy: Tensor, weight: Int4Weight, g: Tensor | None, a: Tensor | None, dx: Tensor, config: TileConfig
) -> dict[str, Any]:
    """The arguments of ``_matmul_dx_kernel``, by name; the tensors may lie on the meta device."""
    rank = 0 if g is None else g.shape[1]
    stride_gm, stride_gr = (0, 0) if g is None else g.stride()
    stride_ar, stride_ak = (0, 0) if a is None else a.stride()
    return {
        "dy_ptr": dy,
        **weight_arguments(weight),
        "g_ptr": g,
        "a_ptr": a,
        "dx_ptr": dx,
        "M": dy.shape[0],
        "N": weight.out_features,
        "K": weight.in_features,
        "R": rank,
        "stride_dym": dy.stride(0),
        "stride_dyn": dy.stride(1),
        "stride_gm": stride_gm,
        "stride_gr": stride_gr,
        "stride_ar": stride_ar,
        "stride_ak": stride_ak,
        "stride_dxm": dx.stride(0),
        "stride_dxk": dx.stride(1),
        "HAS_LORA": g is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": power_of_two_at_least(rank, most=32),
    }


def int4_matmul_dx_triton(
    dy: Tensor,
    weight: Int4Weight,
    g: Tensor | None = None,
    a: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """``dX = dY·W + g·a``.

    Args:
        dy: ``[M, N]`` float32, float16 or bfloat16, any strides (also 0, as of an expanded tensor).
        weight: ``W[N, K]``.
        g: ``[M, R]``, the scaled ``dY·B``; rounded to dy's dtype, as ``a`` is.
        a: ``[R, K]``, LoRA's A.
        config: tile sizes; a default if not given.

    Returns:
        ``[M, K]`` in dy's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    (n, k), device = weight.shape, weight.device
    m = dy.shape[0]
    check_operand("dy", dy, (m, n), device)
    if (g is None) != (a is None):
        raise ValueError(f"g and a go together, got g={'None' if g is None else 'a tensor'} without its partner")
    if g is not None and a is not None:
        check_operand("g", g, (m, g.shape[-1]), device)
        check_operand("a", a, (g.shape[1], k), device)
    dx = torch.empty((m, k), dtype=dy.dtype, device=device)
    if dx.numel() == 0:
        return dx
    config = config or default_config("matmul_dx", m, n, k, weight.group_size, dy.dtype)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(k, config.block_k),)
    with torch.cuda.device_of(dy):
        _matmul_dx_kernel[grid](
            **matmul_dx_arguments(dy, weight, g, a, dx, config),
            **config.launch_options(),
        )
    return dx
