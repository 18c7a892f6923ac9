"""Device functions that sum one tile of a product, for one weight, for a group of weights and for experts."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import decode_planes, unpack_centred
from .weight_tiles import (
    float_scales,
    hold,
    join_planes,
    load_codes,
    load_planes,
    packed_planes,
    plane_columns,
    select,
    to_bank_order,
    weight_of,
)


@triton.jit
def product_tile(
    x_ptr,
    x_strides,
    rows_m,
    mask_m,
    tensors,
    strides,
    codebook_ptr,
    offs_n,
    mask_n,
    span,
    K,
    FORM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    MASK_K: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``W[offs_n]·X[rows_m]ᵀ``, summed over the columns of ``span``: ``[BLOCK_N, BLOCK_M]`` float32.

    x_ptr: ``[M, K]``, with its two strides. tensors, strides, codebook_ptr: the weight, see ``load_planes``.
    """
    dtype = x_ptr.dtype.element_ty
    acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for k0 in tl.range(span[0], span[1], BLOCK_K, num_stages=STAGES):
        offs_k = plane_columns(k0, BLOCK_K)
        x_ptrs = x_ptr + rows_m[None, :] * x_strides[0] + offs_k.to(tl.int64)[:, None] * x_strides[1]
        x_ptrs_high = x_ptr + rows_m[None, :] * x_strides[0] + (offs_k + 32).to(tl.int64)[:, None] * x_strides[1]
        # [BLOCK_J, BLOCK_M]
        x_low = tl.load(x_ptrs, mask=mask_m[None, :] & (offs_k < K)[:, None], other=0.0)
        # [BLOCK_J, BLOCK_M]
        x_high = tl.load(x_ptrs_high, mask=mask_m[None, :] & (offs_k + 32 < K)[:, None], other=0.0)
        if SCALE_SUMS:
            # No column mask is needed: columns from K on meet zeros in x, and the masked scale of a group that is all
            # padding is zero.
            low, high = packed_planes(tensors[0], strides[0], offs_n, mask_n, k0, K, FORM[0], BLOCK_K)
            w_low, w_high = unpack_centred(low, high, FORM[0], dtype, ASM)
            # [BLOCK_N, 1] or [BLOCK_N, BLOCK_M]
            scales = float_scales(tensors, strides, offs_n, mask_n, k0, 0, K, FORM[1], BLOCK_K, BLOCK_M, THREADS)
            total = tl.dot(w_low, x_low, input_precision="ieee")
            if FORM[1] == 32:
                acc = tl.fma(total, tl.broadcast_to(scales, acc.shape), acc)
                scales = float_scales(tensors, strides, offs_n, mask_n, k0, 1, K, FORM[1], BLOCK_K, BLOCK_M, THREADS)
                total = tl.dot(w_high, x_high, input_precision="ieee")
            else:
                total = tl.dot(w_high, x_high, total, input_precision="ieee")
            acc = tl.fma(total, tl.broadcast_to(scales, acc.shape), acc)
        else:
            w_low, w_high = load_planes(
                tensors,
                strides,
                codebook_ptr,
                offs_n,
                mask_n,
                k0,
                K,
                FORM,
                HAS_CODEBOOK,
                MASK_K,
                BLOCK_K,
                THREADS,
                dtype,
                ASM,
            )
            acc = tl.dot(w_low, x_low, acc, input_precision="ieee")
            acc = tl.dot(w_high, x_high, acc, input_precision="ieee")
    return acc


@triton.jit
def add_lora(
    acc,
    operands,
    strides,
    rows_m,
    mask_m,
    rows_n,
    mask_n,
    first_r,
    ranks,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adds ``B[rows_n]·T[rows_m]ᵀ`` to a tile of Yᵀ.

    operands: pointers to T ``[M, ...]``, whose columns from first_r on count, and to B ``[N, R]``; strides: the two of
    each. ranks: how many of R there are to add, a multiple of BLOCK_R or all; and R.
    """
    for r0 in tl.range(0, ranks[0], BLOCK_R, num_stages=1):
        offs_r = r0 + tl.arange(0, BLOCK_R)
        mask_r = offs_r < ranks[1]
        # [BLOCK_N, BLOCK_R]
        b = tl.load(
            operands[1] + rows_n[:, None] * strides[1][0] + offs_r[None, :] * strides[1][1],
            mask=mask_n[:, None] & mask_r[None, :],
            other=0.0,
        )
        # [BLOCK_R, BLOCK_M]
        t = tl.load(
            operands[0] + rows_m[None, :] * strides[0][0] + (first_r + offs_r)[:, None] * strides[0][1],
            mask=mask_m[None, :] & mask_r[:, None],
            other=0.0,
        )
        acc = tl.dot(b.to(DTYPE), t.to(DTYPE), acc, input_precision="ieee")
    return acc


@triton.jit
def dx_tile(
    dy_of,
    dy_strides,
    rows_m,
    mask_m,
    tensors,
    strides,
    codebook_of,
    span,
    ends,
    N_of,
    k0,
    K,
    FORM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    MEMBERS: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``sum dY_i[rows_m]·W_i[:, k0 : k0 + BLOCK_K]`` over the members i of a group and the steps of ``span``.

    dy_of: ``[M, N_of[i]]`` each. dy_strides: those along M of each, and the one along N of all. tensors, strides,
    codebook_of: the weights, as ``weight_of`` takes them. ends: see ``_rows_of_step``.

    Returns ``[BLOCK_M, BLOCK_K]`` float32, with WEIGHT_LEFT transposed; columns in the order of ``to_bank_order``.
    """
    dtype = dy_of[0].dtype.element_ty
    acc = tl.full((BLOCK_K, BLOCK_M) if WEIGHT_LEFT else (BLOCK_M, BLOCK_K), 0.0, tl.float32)
    codes = _codes_of_step(span[0], ends, tensors, strides, N_of, k0, K, FORM, MEMBERS, THREADS, ASM, BLOCK_N, BLOCK_K)
    for step in tl.range(span[0], span[1], num_stages=STAGES):
        member, offs_n, mask_n = _rows_of_step(step, ends, N_of, MEMBERS, BLOCK_N)
        dy_ptrs = (
            select(dy_of, member, MEMBERS)
            + rows_m[:, None] * select(dy_strides[0], member, MEMBERS)
            + offs_n.to(tl.int64)[None, :] * dy_strides[1]
        )
        # [BLOCK_M, BLOCK_N]
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        codebook_ptr = codebook_of[0]
        if HAS_CODEBOOK:
            codebook_ptr = select(codebook_of, member, MEMBERS)
        # Columns from K on need no mask here: they are computed, touch no other column, and are not stored.
        w_low, w_high = decode_planes(codes, codebook_ptr, FORM[0], FORM[2], HAS_CODEBOOK, dtype, ASM)
        w = to_bank_order(join_planes(w_low, w_high))
        codes = _codes_of_step(
            step + 1, ends, tensors, strides, N_of, k0, K, FORM, MEMBERS, THREADS, ASM, BLOCK_N, BLOCK_K
        )
        if WEIGHT_LEFT:
            acc = tl.dot(tl.trans(w), tl.trans(dy), acc, input_precision="ieee")
        else:
            acc = tl.dot(dy, w, acc, input_precision="ieee")
    return acc


@triton.jit
def add_dx_lora(
    acc,
    operands,
    strides,
    rows_m,
    mask_m,
    columns,
    mask_k,
    ranks,
    DTYPE: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adds ``G[rows_m]·A[:, columns]`` to what ``dx_tile`` returned.

    operands: pointers to G ``[M, R]`` and A ``[R, K]``; strides: the two of each. ranks: see ``add_lora``.
    """
    for r0 in tl.range(0, ranks[0], BLOCK_R, num_stages=1):
        offs_r = r0 + tl.arange(0, BLOCK_R)
        mask_r = offs_r < ranks[1]
        # [BLOCK_M, BLOCK_R]
        g = tl.load(
            operands[0] + rows_m[:, None] * strides[0][0] + offs_r[None, :] * strides[0][1],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        ).to(DTYPE)
        # [BLOCK_R, BLOCK_K]
        a = tl.load(
            operands[1] + offs_r.to(tl.int64)[:, None] * strides[1][0] + columns[None, :] * strides[1][1],
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        ).to(DTYPE)
        a = to_bank_order(a)
        if WEIGHT_LEFT:
            acc = tl.dot(tl.trans(a), tl.trans(g), acc, input_precision="ieee")
        else:
            acc = tl.dot(g, a, acc, input_precision="ieee")
    return acc


@triton.jit
def _rows_of_step(step, ends, N_of, MEMBERS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The member that a step belongs to, the rows of its weight that the step sums over, and which of them there are.

    ends: the steps at which the first member ends, the second one, and all. A step behind the last one has no rows.
    """
    member = 0
    block = step
    if MEMBERS > 1:
        member = (step >= ends[0]).to(tl.int32) + (step >= ends[1]).to(tl.int32)
        block = step - select((0, ends[0], ends[1]), member, MEMBERS)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    return member, offs_n, offs_n < tl.where(step < ends[2], select(N_of, member, MEMBERS), 0)


@triton.jit
def _codes_of_step(
    step,
    ends,
    tensors,
    strides,
    N_of,
    k0,
    K,
    FORM: tl.constexpr,
    MEMBERS: tl.constexpr,
    THREADS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loads what a step decodes, see ``load_codes``."""
    member, offs_n, mask_n = _rows_of_step(step, ends, N_of, MEMBERS, BLOCK_N)
    tensors, strides = weight_of(tensors, strides, member, FORM[2], MEMBERS)
    codes = load_codes(tensors, strides, offs_n, mask_n, k0, K, FORM, BLOCK_K, THREADS)
    low, high = codes[0], codes[1]
    if ASM:
        low = hold(low)
        high = low if FORM[0] == 4 else hold(high)  # with 4 bits both planes are in the same bytes
    return low, high, codes[2], codes[3], codes[4], codes[5], codes[6], codes[7]
