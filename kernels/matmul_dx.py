"""``dX = dY·W (+ LoRA)`` from packed weights, for one weight or for several with one input.

The packing is that of the forward pass. Here K is the output's width, so the two planes of a decoded tile are joined.
Weights that had one input (q, k and v) are one reduction over all their rows, so dX is written once.

A step decodes what the step before has brought into registers. If one step did both, the compiler would derive the
layout of the product's operands from bytes, which gives conflicts in shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import TileConfig, default_config, power_of_two_at_least
from .launch import check_operand, column_stride, group_of, in_words, of_members, runs_compiled, weight_arguments
from .layout import Int4Weight
from .product_tiles import add_dx_lora, dx_tile
from .split import parts_of, sum_parts
from .weight_tiles import to_column_order


@triton.jit
def _matmul_dx_kernel(
    dy_of,
    packed_of,
    scales_of,
    minimum_of,
    super_scales_of,
    super_minimum_of,
    codebook_of,
    g_ptr,
    a_ptr,
    dx_ptr,
    M,
    N_of,
    K,
    R,
    stride_dym_of,
    stride_dyn,
    stride_pn,
    stride_pj,
    stride_sg_of,
    stride_sn,
    stride_zg_of,
    stride_zn,
    stride_ug_of,
    stride_un,
    stride_vg_of,
    stride_vn,
    stride_gm,
    stride_gr,
    stride_ar,
    stride_ak,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    HAS_LORA: tl.constexpr,
    MEMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``dX = sum dY_i·W_i + g·a`` over the members i of a group; one tile of dX per program.

    Arguments that end in ``_of`` are tuples with a value for each of three members, of which MEMBERS are there.

    dy_of: ``[M, N_of[i]]``, which may differ in their stride along M alone.
    packed_of, scales_of, minimum_of, super_scales_of, super_minimum_of, codebook_of: the weights ``W_i[N_of[i], K]``,
        see ``load_codes``.
    g_ptr: ``[M, R]``, LoRA's scaled ``dY_i·B_i`` of all members side by side. a_ptr: ``[R, K]``, their A.
    dx_ptr: ``[M, K]``, contiguous.
    SPLIT: the reduction is cut into that many parts, axis 1 of the grid. Each part writes a float32 dX of its own.
    STAGES: the loop's, so that loads are pipelined that no product of the same step uses. THREADS: see ``group_rows``.
    WEIGHT_LEFT: the decoded weight is the left operand, and tiles of dXᵀ are computed. Either way it is decoded once,
        into shared memory. Matrix instructions that take a right operand from there (sm_90, sm_100) want it on the
        right.

    Sums are kept in float32 and rounded once.
    """
    pid = tl.program_id(0)
    # Neighbouring programs share a strip of the weight, which is read from memory once and then from the cache.
    blocks_m = (M + BLOCK_M - 1) // BLOCK_M
    offs_m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = (pid // blocks_m) * BLOCK_K
    mask_m = offs_m < M
    rows_m = offs_m.to(tl.int64)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    columns = offs_k.to(tl.int64)
    mask_k = offs_k < K

    # The reduction's steps run through the rows of the first member by BLOCK_N, then of the second, then of the third.
    # No step holds rows of two members, so that one set of pointers serves it.
    steps_0 = (N_of[0] + BLOCK_N - 1) // BLOCK_N
    steps_1, steps = steps_0, steps_0
    if MEMBERS > 1:
        steps_1 = steps_0 + (N_of[1] + BLOCK_N - 1) // BLOCK_N
        steps = steps_1 + (N_of[2] + BLOCK_N - 1) // BLOCK_N
    begin = 0
    if SPLIT > 1:
        part = tl.program_id(1)
        share = (steps + SPLIT - 1) // SPLIT
        begin = part * share
        steps = tl.minimum(begin + share, steps)
        dx_ptr += part.to(tl.int64) * M * K

    ends = (steps_0, steps_1, steps)
    tensors = (packed_of, scales_of, minimum_of, super_scales_of, super_minimum_of)
    strides = (
        (stride_pn, stride_pj),
        (stride_sg_of, stride_sn),
        (stride_zg_of, stride_zn),
        (stride_ug_of, stride_un),
        (stride_vg_of, stride_vn),
    )
    FORM: tl.constexpr = (BITS, GROUP, HAS_MINIMUM)
    acc = dx_tile(
        dy_of,
        (stride_dym_of, stride_dyn),
        rows_m,
        mask_m,
        tensors,
        strides,
        codebook_of,
        (begin, steps),
        ends,
        N_of,
        k0,
        K,
        FORM,
        HAS_CODEBOOK,
        MEMBERS,
        WEIGHT_LEFT,
        ASM,
        STAGES,
        THREADS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    if HAS_LORA:
        ranks = R
        if SPLIT > 1:
            ranks = tl.where(begin == 0, R, 0)
        acc = add_dx_lora(
            acc,
            (g_ptr, a_ptr),
            ((stride_gm, stride_gr), (stride_ar, stride_ak)),
            rows_m,
            mask_m,
            columns,
            mask_k,
            (ranks, R),
            dy_of[0].dtype.element_ty,
            WEIGHT_LEFT,
            BLOCK_R,
        )

    if WEIGHT_LEFT:
        acc = tl.trans(acc)
    tl.store(
        dx_ptr + rows_m[:, None] * K + columns[None, :],
        to_column_order(acc).to(dx_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_k[None, :],
    )


def matmul_dx_arguments(
    dys: Sequence[Tensor],
    weights: Sequence[Int4Weight],
    g: Tensor | None,
    a: Tensor | None,
    dx: Tensor,
    config: TileConfig,
) -> dict[str, Any]:
    """The arguments of ``_matmul_dx_kernel``, by name; the tensors may lie on the meta device."""
    rank = 0 if g is None else g.shape[1]
    stride_gm, stride_gr = (0, 0) if g is None else g.stride()
    stride_ar, stride_ak = (0, 0) if a is None else a.stride()
    return {
        "dy_of": of_members(dys),
        **weight_arguments(weights),
        "g_ptr": g,
        "a_ptr": a,
        "dx_ptr": dx,
        "M": dys[0].shape[0],
        "K": weights[0].in_features,
        "R": rank,
        "stride_dym_of": of_members([dy.stride(0) for dy in dys], 0),
        "stride_dyn": column_stride(dys),
        "stride_gm": stride_gm,
        "stride_gr": stride_gr,
        "stride_ar": stride_ar,
        "stride_ak": stride_ak,
        "HAS_LORA": g is not None,
        "SPLIT": config.split,
        "WEIGHT_LEFT": config.weight_left,
        "ASM": runs_compiled(_matmul_dx_kernel),
        "STAGES": config.num_stages,
        "THREADS": -1 if in_words(weights) else 32 * config.num_warps,
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
    """Computes ``dX = dY·W + g·a``.

    Args:
        dy: ``[M, N]`` float32, float16 or bfloat16, any strides (0 included, as an expanded tensor has).
        weight: ``W[N, K]``.
        g: ``[M, R]``, LoRA's scaled ``dY·B``. Like ``a``, it is rounded to dy's dtype.
        a: ``[R, K]``, LoRA's A.
        config: tile sizes; the default if not given.

    Returns:
        ``[M, K]`` in dy's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    return int4_matmul_dx_group_triton([dy], [weight], g, a, config)


def int4_matmul_dx_group_triton(
    dys: Sequence[Tensor],
    weights: Sequence[Int4Weight],
    g: Tensor | None = None,
    a: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Computes ``dX = sum dY_i·W_i + g·a`` in one launch, which writes it once.

    Args:
        dys: ``[M, N_i]`` each, of one dtype.
        weights: at most three, for which ``can_group`` holds.
        g: ``[M, R]``, the members' side by side, R being the sum of their ranks. a: ``[R, K]``, below each other.
        config: tile sizes; the default if not given.

    Returns:
        ``[M, K]`` in the gradients' dtype.

    Raises:
        ValueError: the weights cannot share a launch, or shapes, dtypes or devices do not fit together.
    """
    group = group_of(weights)
    if group is None or len(dys) != len(weights):
        raise ValueError(f"{len(dys)} gradients and {len(weights)} weights cannot share a launch: see can_group")
    k, device = weights[0].in_features, weights[0].device
    m, dtype = dys[0].shape[0], dys[0].dtype
    for dy, weight in zip(dys, weights, strict=True):
        check_operand("dy", dy, (m, weight.out_features), device)
        if dy.dtype != dtype:
            raise ValueError(f"the gradients of a group must have one dtype, got {dtype} and {dy.dtype}")
    if (g is None) != (a is None):
        raise ValueError(f"g and a go together, got g={'None' if g is None else 'a tensor'} without its partner")
    if g is not None and a is not None:
        check_operand("g", g, (m, g.shape[-1]), device)
        check_operand("a", a, (g.shape[1], k), device)
    if len(dys) > 1 and len({dy.stride(1) for dy in dys if dy.shape[1] > 1}) > 1:
        dys = [dy.contiguous() for dy in dys]
    dx = torch.empty((m, k), dtype=dtype, device=device)
    if dx.numel():
        problem = group.problem("matmul_dx", m, dtype)
        config = config or default_config(problem)
        (out,) = parts_of([dx], config.split)

        def new() -> tuple[dict[str, Any], dict[str, Any]]:
            if not config.suits(problem):
                raise ValueError(f"{config} does not suit {problem}")
            return matmul_dx_arguments(dys, weights, g, a, out, config), config.launch_options()

        grid = -(-m // config.block_m) * -(-k // config.block_k), config.split
        operands = {"dy_of": of_members(dys), "g_ptr": g, "a_ptr": a, "dx_ptr": out, "M": m}
        group.launch(_matmul_dx_kernel, grid, (config,), operands, new)
        sum_parts([out], [dx], config.split)
    return dx
