"""``Y = X·Wᵀ (+ bias, + LoRA)`` straight from packed 4-bit weights: decoding, kernel, launcher.

The decoded weights are the left operand of the dot, that is, the kernel computes tiles of Yᵀ: tensor cores then
take them from registers, and no warp decodes what another one has decoded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import TileConfig, default_config, power_of_two_at_least
from .layout import Int4Weight

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def load_group_rows(ptr, offs_n, mask_n, k0, plane, K, stride_g, stride_n, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """The scales (or minima) of one plane of a tile, in float32.

    ptr ``[groups, N]``. A plane's run of 32 columns lies within one group, so one row per chunk of 64 is enough.
    Returns ``[BLOCK_N, 1]`` where the whole tile lies within one group, ``[BLOCK_N, BLOCK_K // 2]`` otherwise.
    """
    CHUNKS: tl.constexpr = 1 if GROUP >= BLOCK_K else BLOCK_K // 64
    offs_c = k0 + tl.arange(0, CHUNKS) * 64
    offs_g = ((offs_c + plane * 32) // GROUP).to(tl.int64)
    # [BLOCK_N, CHUNKS]
    rows = tl.load(
        ptr + offs_g[None, :] * stride_g + offs_n.to(tl.int64)[:, None] * stride_n,
        mask=mask_n[:, None] & (offs_c < K)[None, :],
        other=0.0,
    ).to(tl.float32)
    if CHUNKS > 1:
        rows = tl.broadcast_to(rows[:, :, None], (rows.shape[0], CHUNKS, 32))
        rows = tl.reshape(rows, (rows.shape[0], CHUNKS * 32))
    return rows


@triton.jit
def decode(
    codes,
    scales,
    minima,
    codebook_ptr,
    HAS_MINIMUM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    EXACT_PRODUCT: tl.constexpr,
):
    """Codes 0..15 -> float32 weights, the same bits as plain torch gives.

    ``minima`` and ``codebook_ptr`` are read by their schemes only. EXACT_PRODUCT: a code times a scale needs no
    rounding (float16 scales), so that a fused multiply-add changes nothing.
    """
    if HAS_CODEBOOK:
        # A table in memory is the simple way, not the fast one.
        return tl.load(codebook_ptr + codes.to(tl.int32)) * scales
    elif HAS_MINIMUM and EXACT_PRODUCT:
        return tl.fma(codes.to(tl.float32), scales, minima)
    elif HAS_MINIMUM:
        return codes.to(tl.float32) * scales + minima
    else:
        return (codes.to(tl.float32) - 8.0) * scales


@triton.jit
def load_planes(
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
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Decodes ``W[offs_n, k0 : k0 + BLOCK_K]``: the low and the high plane, each ``[BLOCK_N, BLOCK_K // 2]``.

    packed_ptr ``[N, padded(K) // 2]`` uint8: byte ``c * 32 + j`` holds column ``c * 64 + j`` in its low nibble and
    ``c * 64 + 32 + j`` in its high nibble. scales_ptr, minimum_ptr ``[groups, N]``; codebook_ptr ``[16]``.
    k0 is a multiple of 64. Rows with a false mask decode to a finite value without being read; so do, with MASK_K,
    columns from K on, as zeros (what their padding holds is of no meaning).
    """
    offs_j = tl.arange(0, BLOCK_K // 2)
    # The column of the low nibble; the high nibble's is 32 further on.
    offs_k = k0 + offs_j // 32 * 64 + offs_j % 32
    offs_p = (k0 // 2 + offs_j).to(tl.int64)
    # The packed row goes on to the end of K's last chunk.
    mask_p = k0 + offs_j // 32 * 64 < K
    # [BLOCK_N, BLOCK_J]
    packed = tl.load(
        packed_ptr + offs_n.to(tl.int64)[:, None] * stride_pn + offs_p[None, :] * stride_pj,
        mask=mask_n[:, None] & mask_p[None, :],
        other=0,
    )
    # [BLOCK_N, BLOCK_J] or [BLOCK_N, 1]
    scales_low = load_group_rows(scales_ptr, offs_n, mask_n, k0, 0, K, stride_sg, stride_sn, GROUP, BLOCK_K)
    minima_low = scales_low
    if HAS_MINIMUM:
        minima_low = load_group_rows(minimum_ptr, offs_n, mask_n, k0, 0, K, stride_zg, stride_zn, GROUP, BLOCK_K)
    scales_high = scales_low
    minima_high = minima_low
    if GROUP == 32:
        scales_high = load_group_rows(scales_ptr, offs_n, mask_n, k0, 1, K, stride_sg, stride_sn, GROUP, BLOCK_K)
        minima_high = scales_high
        if HAS_MINIMUM:
            minima_high = load_group_rows(minimum_ptr, offs_n, mask_n, k0, 1, K, stride_zg, stride_zn, GROUP, BLOCK_K)
    EXACT: tl.constexpr = scales_ptr.dtype.element_ty == tl.float16
    low = decode(packed & 0xF, scales_low, minima_low, codebook_ptr, HAS_MINIMUM, HAS_CODEBOOK, EXACT)
    high = decode(packed >> 4, scales_high, minima_high, codebook_ptr, HAS_MINIMUM, HAS_CODEBOOK, EXACT)
    if MASK_K:
        low = tl.where((offs_k < K)[None, :], low, 0.0)
        high = tl.where((offs_k + 32 < K)[None, :], high, 0.0)
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def _matmul_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    minimum_ptr,
    codebook_ptr,
    bias_ptr,
    t_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_pn,
    stride_pj,
    stride_sg,
    stride_sn,
    stride_zg,
    stride_zn,
    stride_bias,
    stride_tm,
    stride_tr,
    stride_bn,
    stride_br,
    stride_ym,
    stride_yn,
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``Y = X·Wᵀ + bias + t·bᵀ``, one tile of Yᵀ per program.

    x_ptr ``[M, K]``; packed_ptr, scales_ptr, minimum_ptr, codebook_ptr: the weight ``W[N, K]``, see ``load_planes``;
    bias_ptr ``[N]``; t_ptr ``[M, R]`` (scaled ``X·Aᵀ``); b_ptr ``[N, R]``; y_ptr ``[M, N]``.
    Sums are kept in float32 and rounded once, after bias and LoRA.
    """
    pid = tl.program_id(0)
    # Neighbouring programs share a tile of the weight.
    blocks_m = (M + BLOCK_M - 1) // BLOCK_M
    offs_m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    rows_m = offs_m.to(tl.int64)
    rows_n = offs_n.to(tl.int64)
    offs_j = tl.arange(0, BLOCK_K // 2)
    dtype = x_ptr.dtype.element_ty

    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for k0 in range(0, K, BLOCK_K):
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
            MASK_K,
            BLOCK_K,
            dtype,
        )
        offs_k = k0 + offs_j // 32 * 64 + offs_j % 32
        x_ptrs = x_ptr + rows_m[None, :] * stride_xm + offs_k.to(tl.int64)[:, None] * stride_xk
        # [BLOCK_J, BLOCK_M]
        x_low = tl.load(x_ptrs, mask=mask_m[None, :] & (offs_k < K)[:, None], other=0.0)
        acc = tl.dot(w_low, x_low, acc, input_precision="ieee")
        # [BLOCK_J, BLOCK_M]
        x_high = tl.load(x_ptrs + 32 * stride_xk, mask=mask_m[None, :] & (offs_k + 32 < K)[:, None], other=0.0)
        acc = tl.dot(w_high, x_high, acc, input_precision="ieee")

    if HAS_LORA:
        for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
            offs_r = r0 + tl.arange(0, BLOCK_R)
            mask_r = offs_r < R
            # [BLOCK_N, BLOCK_R]
            b = tl.load(
                b_ptr + rows_n[:, None] * stride_bn + offs_r[None, :] * stride_br,
                mask=mask_n[:, None] & mask_r[None, :],
                other=0.0,
            )
            # [BLOCK_R, BLOCK_M]
            t = tl.load(
                t_ptr + rows_m[None, :] * stride_tm + offs_r[:, None] * stride_tr,
                mask=mask_m[None, :] & mask_r[:, None],
                other=0.0,
            )
            acc = tl.dot(b.to(dtype), t.to(dtype), acc, input_precision="ieee")

    if HAS_BIAS:
        # [BLOCK_N]
        bias = tl.load(bias_ptr + rows_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[:, None]

    tl.store(
        y_ptr + rows_m[None, :] * stride_ym + rows_n[:, None] * stride_yn,
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[None, :] & mask_n[:, None],
    )


def weight_arguments(weight: Int4Weight) -> dict[str, Any]:
    """What every kernel takes of a weight: pointers, strides and the flags of its scheme."""
    stride_zg, stride_zn = (0, 0) if weight.minimum is None else weight.minimum.stride()
    return {
        "packed_ptr": weight.packed,
        "scales_ptr": weight.scales,
        "minimum_ptr": weight.minimum,
        "codebook_ptr": weight.codebook,
        "stride_pn": weight.packed.stride(0),
        "stride_pj": weight.packed.stride(1),
        "stride_sg": weight.scales.stride(0),
        "stride_sn": weight.scales.stride(1),
        "stride_zg": stride_zg,
        "stride_zn": stride_zn,
        "GROUP": weight.group_size,
        "HAS_MINIMUM": weight.minimum is not None,
        "HAS_CODEBOOK": weight.codebook is not None,
    }


def check_operand(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ``ValueError`` unless ``tensor`` is a float tensor of that shape on that device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be one of {FLOAT_DTYPES}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where the weight is, got {tensor.device}")


def matmul_arguments(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None,
    t: Tensor | None,
    b: Tensor | None,
    y: Tensor,
    config: TileConfig,
) -> dict[str, Any]:
    """The arguments of ``_matmul_kernel``, by name; the tensors may lie on the meta device."""
    rank = 0 if t is None else t.shape[1]
    stride_tm, stride_tr = (0, 0) if t is None else t.stride()
    stride_bn, stride_br = (0, 0) if b is None else b.stride()
    return {
        "x_ptr": x,
        **weight_arguments(weight),
        "bias_ptr": bias,
        "t_ptr": t,
        "b_ptr": b,
        "y_ptr": y,
        "M": x.shape[0],
        "N": weight.out_features,
        "K": weight.in_features,
        "R": rank,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_bias": 0 if bias is None else bias.stride(0),
        "stride_tm": stride_tm,
        "stride_tr": stride_tr,
        "stride_bn": stride_bn,
        "stride_br": stride_br,
        "stride_ym": y.stride(0),
        "stride_yn": y.stride(1),
        "HAS_BIAS": bias is not None,
        "HAS_LORA": t is not None,
        "MASK_K": weight.in_features % config.block_k != 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": power_of_two_at_least(rank, most=32),
    }


def int4_matmul_triton(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    b: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """``Y = X·Wᵀ + bias + t·bᵀ``.

    Args:
        x: ``[M, K]`` float32, float16 or bfloat16, any strides.
        weight: ``W[N, K]``.
        bias: ``[N]``.
        t: ``[M, R]``, the scaled ``X·Aᵀ``; rounded to x's dtype, as ``b`` is.
        b: ``[N, R]``, LoRA's B.
        config: tile sizes; a default if not given.

    Returns:
        ``[M, N]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    (n, k), device = weight.shape, weight.device
    m = x.shape[0]
    check_operand("x", x, (m, k), device)
    if bias is not None:
        check_operand("bias", bias, (n,), device)
    if (t is None) != (b is None):
        raise ValueError(f"t and b go together, got t={'None' if t is None else 'a tensor'} without its partner")
    if t is not None and b is not None:
        check_operand("t", t, (m, t.shape[-1]), device)
        check_operand("b", b, (n, t.shape[1]), device)
    y = torch.empty((m, n), dtype=x.dtype, device=device)
    if y.numel() == 0:
        return y
    config = config or default_config("matmul", m, n, k, weight.group_size, x.dtype)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    with torch.cuda.device_of(x):
        _matmul_kernel[grid](
            **matmul_arguments(x, weight, bias, t, b, y, config),
            **config.launch_options(),
        )
    return y
