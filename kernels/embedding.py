"""Rows of a packed matrix, decoded by a kernel: rows by id for an embedding, consecutive rows for a panel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import MIN_DOT, Problem, TileConfig, default_config
from .launch import FLOAT_DTYPES, runs_compiled, scheme_arguments, stride_of
from .layout import Int4Weight
from .weight_tiles import load_planes, plane_columns
from .workspace import is_traced

# Tiles of a panel are 64 rows by two chunks of columns, which are stored in runs of 64 bytes.
PANEL_CONFIG = TileConfig(block_m=64, block_n=MIN_DOT, block_k=128, num_warps=4, num_stages=1)


@triton.jit
def _embedding_kernel(
    ids_ptr,
    packed_ptr,
    scales_ptr,
    minimum_ptr,
    super_scales_ptr,
    super_minimum_ptr,
    codebook_ptr,
    rows_ptr,
    M,
    N,
    K,
    stride_im,
    stride_pn,
    stride_pj,
    stride_sg,
    stride_sn,
    stride_zg,
    stride_zn,
    stride_ug,
    stride_un,
    stride_vg,
    stride_vn,
    stride_rm,
    stride_rk,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``rows[m, k] = W[ids[m], k]``, or ``W[m, k]`` without HAS_IDS; one tile per program.

    ids_ptr: ``[M]`` int64. An id outside ``0..N-1`` reads nothing and gives a row of NaN.
    packed_ptr, scales_ptr, minimum_ptr, super_scales_ptr, super_minimum_ptr, codebook_ptr: the table ``W[N, K]``, see
        ``load_planes``.
    rows_ptr: ``[M, K]``.
    """
    pid = tl.program_id(0)
    blocks_m = (M + BLOCK_M - 1) // BLOCK_M
    offs_m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = (pid // blocks_m) * BLOCK_K
    mask_m = offs_m < M
    rows_m = offs_m.to(tl.int64)
    ids = rows_m
    if HAS_IDS:
        # [BLOCK_M]
        ids = tl.load(ids_ptr + rows_m * stride_im, mask=mask_m, other=-1)
    valid = (ids >= 0) & (ids < N)
    low, high = load_planes(
        (packed_ptr, scales_ptr, minimum_ptr, super_scales_ptr, super_minimum_ptr),
        (
            (stride_pn, stride_pj),
            (stride_sg, stride_sn),
            (stride_zg, stride_zn),
            (stride_ug, stride_un),
            (stride_vg, stride_vn),
        ),
        codebook_ptr,
        ids,
        valid,
        k0,
        K,
        (BITS, GROUP, HAS_MINIMUM),
        HAS_CODEBOOK,
        False,
        BLOCK_K,
        0,
        rows_ptr.dtype.element_ty,
        ASM,
    )
    low = tl.where(valid[:, None], low, float("nan"))
    high = tl.where(valid[:, None], high, float("nan"))
    offs_k = plane_columns(k0, BLOCK_K)
    rows_ptrs = rows_ptr + rows_m[:, None] * stride_rm + offs_k[None, :] * stride_rk
    tl.store(rows_ptrs, low, mask=mask_m[:, None] & (offs_k < K)[None, :])
    tl.store(rows_ptrs + 32 * stride_rk, high, mask=mask_m[:, None] & (offs_k + 32 < K)[None, :])


def embedding_arguments(ids: Tensor | None, weight: Int4Weight, rows: Tensor, config: TileConfig) -> dict[str, Any]:
    """The arguments of ``_embedding_kernel``, by name; the tensors may lie on the meta device."""
    return {
        "ids_ptr": ids,
        "packed_ptr": weight.packed,
        "scales_ptr": weight.scales,
        "minimum_ptr": weight.minimum,
        "super_scales_ptr": weight.super_scales,
        "super_minimum_ptr": weight.super_minimum,
        "codebook_ptr": weight.codebook,
        "rows_ptr": rows,
        "M": rows.shape[0],
        "N": weight.out_features,
        "K": weight.in_features,
        "stride_im": 0 if ids is None else ids.stride(0),
        "stride_sg": weight.scales.stride(0),
        "stride_zg": stride_of(weight.minimum, 0),
        "stride_ug": stride_of(weight.super_scales, 0),
        "stride_vg": stride_of(weight.super_minimum, 0),
        **scheme_arguments(weight),
        "stride_rm": rows.stride(0),
        "stride_rk": rows.stride(1),
        "HAS_IDS": ids is not None,
        "ASM": runs_compiled(_embedding_kernel),
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
    }


def _launch(ids: Tensor | None, weight: Int4Weight, rows: Tensor, config: TileConfig) -> None:
    if is_traced(rows):
        return
    grid = (triton.cdiv(rows.shape[0], config.block_m) * triton.cdiv(weight.in_features, config.block_k),)
    with torch.cuda.device_of(rows):
        _embedding_kernel[grid](
            **embedding_arguments(ids, weight, rows, config),
            **config.launch_options(),
        )


def int4_embedding_triton(
    ids: Tensor, weight: Int4Weight, dtype: torch.dtype, config: TileConfig | None = None
) -> Tensor:
    """Decodes rows ``ids`` of a table.

    Args:
        ids: int64, any shape and strides. They are not checked, which would stall the device. One outside ``0..N-1``
            gives a row of NaN.
        weight: the table ``W[N, K]``.
        dtype: float32, float16 or bfloat16.
        config: tile sizes; the default if not given.

    Returns:
        ``[*ids.shape, K]`` in ``dtype``.

    Raises:
        ValueError: dtypes or devices do not fit together.
    """
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, got {ids.dtype}")
    if ids.device != weight.device:
        raise ValueError(f"ids must be on {weight.device}, where the weight is, got {ids.device}")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be one of {FLOAT_DTYPES}, got {dtype}")
    n, k = weight.shape
    flat = ids.reshape(-1)
    m = flat.shape[0]
    rows = torch.empty((m, k), dtype=dtype, device=weight.device)
    if rows.numel():
        problem = Problem("embedding", m, n, k, weight.scheme, weight.group_size, dtype, weight.bits)
        _launch(flat, weight, rows, config or default_config(problem))
    return rows.view(*ids.shape, k)


def decode_rows_triton(weight: Int4Weight, out: Tensor) -> Tensor:
    """Decodes all rows of ``weight`` into ``out`` ``[N, K]`` (float32, float16 or bfloat16), and returns it."""
    if out.numel():
        _launch(None, weight, out, PANEL_CONFIG)
    return out
