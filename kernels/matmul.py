"""``Y = X·Wᵀ (+ bias, + LoRA)`` from packed weights, for one weight or for several with one input.

The decoded weights are the left operand of the dot, so the kernel computes tiles of Yᵀ. Tensor cores take a left
operand from registers, split by rows among the warps. So the weights need not go through shared memory, and no warp
decodes what another one has decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import TileConfig, default_config, power_of_two_at_least
from .launch import check_operand, group_of, of_members, runs_compiled, weight_arguments
from .layout import Int4Weight
from .product_tiles import add_lora, product_tile
from .split import parts_of, sum_parts
from .weight_tiles import select, weight_of


@triton.jit
def _matmul_kernel(
    x_ptr,
    packed_of,
    scales_of,
    minimum_of,
    super_scales_of,
    super_minimum_of,
    codebook_of,
    bias_ptr,
    t_ptr,
    b_ptr,
    y_of,
    M,
    N_of,
    K,
    R,
    stride_xm,
    stride_xk,
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
    stride_bias,
    stride_tm,
    stride_tr,
    stride_bn,
    stride_br,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    MASK_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``Y_i = X·W_iᵀ + bias_i + t_i·b_iᵀ`` for each member i of a group; one tile of one member's Yᵀ per program.

    Arguments that end in ``_of`` are tuples with a value for each of three members, of which MEMBERS are there.

    x_ptr: ``[M, K]``.
    packed_of, scales_of, minimum_of, super_scales_of, super_minimum_of, codebook_of: the weights ``W_i[N_of[i], K]``,
        see ``load_planes``.
    bias_ptr: ``[sum N_of]``. b_ptr: ``[sum N_of, R]``, LoRA's B. The members' rows lie below each other.
    t_ptr: ``[M, MEMBERS * R]``, LoRA's scaled ``X·A_iᵀ`` of the members side by side.
    y_of: ``[M, N_of[i]]``, contiguous.
    SPLIT: the reduction is cut into that many parts, axis 1 of the grid. Each part writes float32 outputs of its own,
        which lie behind those of the part before, all members' together.
    SCALE_SUMS: scales multiply the sums over a group instead of the weights.
    STAGES: the loop's, so that loads are pipelined that no product uses. THREADS: see ``group_rows``.

    Sums are kept in float32 and rounded once, after bias and LoRA.
    """
    pid = tl.program_id(0)
    # Neighbouring programs share a tile of the weight, which is read from memory once and then from the cache.
    blocks_m = (M + BLOCK_M - 1) // BLOCK_M
    offs_m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = pid // blocks_m
    member = 0
    first = 0
    if MEMBERS > 1:
        blocks_0 = (N_of[0] + BLOCK_N - 1) // BLOCK_N
        blocks_1 = blocks_0 + (N_of[1] + BLOCK_N - 1) // BLOCK_N
        member = (block >= blocks_0).to(tl.int32) + (block >= blocks_1).to(tl.int32)
        block -= select((0, blocks_0, blocks_1), member, MEMBERS)
        first = select((0, N_of[0], N_of[0] + N_of[1]), member, MEMBERS)
    outs = select(N_of, member, MEMBERS)
    tensors, strides = weight_of(
        (packed_of, scales_of, minimum_of, super_scales_of, super_minimum_of),
        (
            (stride_pn, stride_pj),
            (stride_sg_of, stride_sn),
            (stride_zg_of, stride_zn),
            (stride_ug_of, stride_un),
            (stride_vg_of, stride_vn),
        ),
        member,
        HAS_MINIMUM,
        MEMBERS,
    )
    codebook_ptr = codebook_of[0]
    if HAS_CODEBOOK:
        codebook_ptr = select(codebook_of, member, MEMBERS)
    y_ptr = select(y_of, member, MEMBERS)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < outs
    rows_m = offs_m.to(tl.int64)
    rows_n = (first + offs_n).to(tl.int64)
    k_begin = 0
    k_end = K
    if SPLIT > 1:
        part = tl.program_id(1)
        share = ((K + BLOCK_K - 1) // BLOCK_K + SPLIT - 1) // SPLIT * BLOCK_K
        k_begin = part * share
        k_end = tl.minimum(k_begin + share, K)
        y_ptr += part.to(tl.int64) * M * (N_of[0] + N_of[1] + N_of[2])

    FORM: tl.constexpr = (BITS, GROUP, HAS_MINIMUM)
    acc = product_tile(
        x_ptr,
        (stride_xm, stride_xk),
        rows_m,
        mask_m,
        tensors,
        strides,
        codebook_ptr,
        offs_n,
        mask_n,
        (k_begin, k_end),
        K,
        FORM,
        HAS_CODEBOOK,
        MASK_K,
        SCALE_SUMS,
        ASM,
        STAGES,
        THREADS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    # Bias and LoRA are added in the first part alone, or the second pass would count them SPLIT times.
    ranks = R
    if SPLIT > 1:
        ranks = tl.where(k_begin == 0, R, 0)
    if HAS_LORA:
        acc = add_lora(
            acc,
            (t_ptr, b_ptr),
            ((stride_tm, stride_tr), (stride_bn, stride_br)),
            rows_m,
            mask_m,
            rows_n,
            mask_n,
            member * R,
            (ranks, R),
            x_ptr.dtype.element_ty,
            BLOCK_R,
        )

    if HAS_BIAS:
        # [BLOCK_N]
        bias = tl.load(bias_ptr + rows_n * stride_bias, mask=mask_n, other=0.0)
        if SPLIT > 1:
            bias = tl.where(k_begin == 0, bias, 0.0)
        acc += bias.to(tl.float32)[:, None]

    tl.store(
        y_ptr + rows_m[None, :] * outs + offs_n[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[None, :] & mask_n[:, None],
    )


def matmul_arguments(
    x: Tensor,
    weights: Sequence[Int4Weight],
    bias: Tensor | None,
    t: Tensor | None,
    b: Tensor | None,
    ys: Sequence[Tensor],
    config: TileConfig,
) -> dict[str, Any]:
    """The arguments of ``_matmul_kernel``, by name; the tensors may lie on the meta device."""
    rank = 0 if b is None else b.shape[1]
    stride_tm, stride_tr = (0, 0) if t is None else t.stride()
    stride_bn, stride_br = (0, 0) if b is None else b.stride()
    return {
        "x_ptr": x,
        **weight_arguments(weights),
        "bias_ptr": bias,
        "t_ptr": t,
        "b_ptr": b,
        "y_of": of_members(ys),
        "M": x.shape[0],
        "K": weights[0].in_features,
        "R": rank,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_bias": 0 if bias is None else bias.stride(0),
        "stride_tm": stride_tm,
        "stride_tr": stride_tr,
        "stride_bn": stride_bn,
        "stride_br": stride_br,
        "HAS_BIAS": bias is not None,
        "HAS_LORA": t is not None,
        "MASK_K": weights[0].in_features % config.block_k != 0,
        "SPLIT": config.split,
        "SCALE_SUMS": config.scale_sums,
        "ASM": runs_compiled(_matmul_kernel),
        "STAGES": config.num_stages,
        "THREADS": 32 * config.num_warps,
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
    """Computes ``Y = X·Wᵀ + bias + t·bᵀ``.

    Args:
        x: ``[M, K]`` float32, float16 or bfloat16, any strides.
        weight: ``W[N, K]``.
        bias: ``[N]``.
        t: ``[M, R]``, LoRA's scaled ``X·Aᵀ``. Like ``b``, it is rounded to x's dtype.
        b: ``[N, R]``, LoRA's B.
        config: tile sizes; the default if not given.

    Returns:
        ``[M, N]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    return int4_matmul_group_triton(x, [weight], bias, t, b, config)[0]


def int4_matmul_group_triton(
    x: Tensor,
    weights: Sequence[Int4Weight],
    bias: Tensor | None = None,
    t: Tensor | None = None,
    b: Tensor | None = None,
    config: TileConfig | None = None,
) -> list[Tensor]:
    """Computes ``int4_matmul_triton`` of several weights ``W_i[N_i, K]`` with one input, in one launch.

    Args:
        x: ``[M, K]``.
        weights: at most three, for which ``can_group`` holds.
        bias: ``[sum N_i]``, the members' below each other. b: ``[sum N_i, R]``, likewise.
        t: ``[M, members * R]``, the members' side by side.
        config: tile sizes; the default if not given.

    Returns:
        ``[M, N_i]`` each.

    Raises:
        ValueError: the weights cannot share a launch, or shapes, dtypes or devices do not fit together.
    """
    group = group_of(weights)
    if group is None:
        raise ValueError(f"{len(weights)} weights cannot share a launch: see can_group")
    n, m, device = group.n, x.shape[0], weights[0].device
    check_operand("x", x, (m, weights[0].in_features), device)
    if bias is not None:
        check_operand("bias", bias, (n,), device)
    if (t is None) != (b is None):
        raise ValueError(f"t and b go together, got t={'None' if t is None else 'a tensor'} without its partner")
    if t is not None and b is not None:
        rank = t.shape[-1] // len(weights)
        check_operand("t", t, (m, len(weights) * rank), device)
        check_operand("b", b, (n, rank), device)
    ys = [torch.empty((m, size), dtype=x.dtype, device=device) for size in group.sizes]
    if m * n:
        problem = group.problem("matmul", m, x.dtype)
        config = config or default_config(problem)
        outs = parts_of(ys, config.split)

        def new() -> tuple[dict[str, Any], dict[str, Any]]:
            if not config.suits(problem):
                raise ValueError(f"{config} does not suit {problem}")
            return matmul_arguments(x, weights, bias, t, b, outs, config), config.launch_options()

        blocks_n = sum(-(-size // config.block_n) for size in group.sizes)
        grid = -(-m // config.block_m) * blocks_n, config.split
        operands = {"x_ptr": x, "bias_ptr": bias, "t_ptr": t, "b_ptr": b, "y_of": of_members(outs), "M": m}
        group.launch(_matmul_kernel, grid, (config,), operands, new)
        sum_parts(outs, ys, config.split)
    return ys
