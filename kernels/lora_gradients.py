"""``out_i = left_iᵀ·right_i``, summed over all tokens in float32, for up to three members in one launch.

These are the gradients of LoRA's matrices: ``dB_i = dY_iᵀ·t_i`` of the layers with one input, and ``dAᵀ = Xᵀ·g``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .configs import MIN_DOT, MOST_MEMBERS, power_of_two_at_least
from .launch import WEIGHTLESS, check_operand, of_members
from .weight_tiles import select

BLOCK_M = 64
# A few thousand columns of dY must give each of some hundred processors a program of its own.
BLOCK_N = 32


@triton.jit
def _lora_gradients_kernel(
    left_of,
    right_of,
    out_of,
    M,
    N_of,
    R,
    stride_lm_of,
    stride_ln_of,
    stride_rm,
    stride_rr,
    stride_on_of,
    stride_or_of,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``out_i = left_iᵀ·right_i`` for each member i; one tile of one member's output per program.

    Arguments that end in ``_of`` are tuples with a value for each of three members, of which MEMBERS are there.

    left_of: ``[M, N_of[i]]``. right_of: ``[M, R]``, of one stride. out_of: ``[N_of[i], R]``.

    A program sums over all tokens, one block after another, so the result does not change from run to run. Sums are
    kept in float32 and rounded once.
    """
    block = tl.program_id(0)
    member = 0
    if MEMBERS > 1:
        blocks_0 = (N_of[0] + BLOCK_N - 1) // BLOCK_N
        blocks_1 = blocks_0 + (N_of[1] + BLOCK_N - 1) // BLOCK_N
        member = (block >= blocks_0).to(tl.int32) + (block >= blocks_1).to(tl.int32)
        block -= select((0, blocks_0, blocks_1), member, MEMBERS)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n = offs_n < select(N_of, member, MEMBERS)
    mask_r = offs_r < R
    columns_n = offs_n.to(tl.int64)
    left_ptrs = select(left_of, member, MEMBERS) + columns_n[None, :] * select(stride_ln_of, member, MEMBERS)
    right_ptrs = select(right_of, member, MEMBERS) + offs_r.to(tl.int64)[None, :] * stride_rr
    stride_lm = select(stride_lm_of, member, MEMBERS)

    acc = tl.full((BLOCK_N, BLOCK_R), 0.0, tl.float32)
    for m0 in range(0, M, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows_m = offs_m.to(tl.int64)
        # [BLOCK_M, BLOCK_N]
        left = tl.load(left_ptrs + rows_m[:, None] * stride_lm, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        # [BLOCK_M, BLOCK_R]
        right = tl.load(right_ptrs + rows_m[:, None] * stride_rm, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")

    out_ptr = select(out_of, member, MEMBERS)
    out_ptrs = (
        out_ptr
        + columns_n[:, None] * select(stride_on_of, member, MEMBERS)
        + offs_r.to(tl.int64)[None, :] * select(stride_or_of, member, MEMBERS)
    )
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_r[None, :])


def lora_gradients_arguments(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], outs: Sequence[Tensor]
) -> dict[str, Any]:
    """The arguments of ``_lora_gradients_kernel``, by name; the tensors may lie on the meta device."""

    def strides(tensors: Sequence[Tensor], axis: int) -> tuple[int, ...]:
        return of_members([tensor.stride(axis) for tensor in tensors], 0)

    tokens, rank = rights[0].shape
    return {
        "left_of": of_members(lefts),
        "right_of": of_members(rights),
        "out_of": of_members(outs),
        "M": tokens,
        "N_of": (*[out.shape[0] for out in outs], *[0] * (MOST_MEMBERS - len(outs))),
        "R": rank,
        "stride_lm_of": strides(lefts, 0),
        "stride_ln_of": strides(lefts, 1),
        "stride_rm": rights[0].stride(0),
        "stride_rr": rights[0].stride(1),
        "stride_on_of": strides(outs, 0),
        "stride_or_of": strides(outs, 1),
        "MEMBERS": len(outs),
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCK_R": _block_r(rank),
    }


def lora_gradients_triton(lefts: Sequence[Tensor], rights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Writes ``left_iᵀ·right_i`` into each of ``outs``, in one launch.

    Args:
        lefts: ``[M, N_i]`` each, at most three, float32, float16 or bfloat16; any strides.
        rights: ``[M, R]`` each, of one stride, as slices of one tensor have it.
        outs: ``[N_i, R]`` each; any strides.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if not 1 <= len(lefts) == len(rights) == len(outs) <= MOST_MEMBERS:
        raise ValueError(f"one launch takes 1 to {MOST_MEMBERS} members, got {len(lefts)}, {len(rights)}, {len(outs)}")
    (tokens, rank), device = rights[0].shape, rights[0].device
    for left, right, out in zip(lefts, rights, outs, strict=True):
        check_operand("left", left, (tokens, out.shape[0]), device)
        check_operand("right", right, (tokens, rank), device)
        check_operand("out", out, (out.shape[0], rank), device)
        alike = left.dtype == lefts[0].dtype and out.dtype == outs[0].dtype
        if not alike or right.dtype != left.dtype or right.stride() != rights[0].stride():
            raise ValueError(f"members differ in a dtype or stride: {left.dtype}, {right.dtype}, {right.stride()}")
    blocks = sum(-(-out.shape[0] // BLOCK_N) for out in outs)
    if blocks and outs[0].numel():

        def new() -> tuple[dict[str, Any], dict[str, Any]]:
            options = {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": False}
            return lora_gradients_arguments(lefts, rights, outs), options

        tensors = {"left_of": of_members(lefts), "right_of": of_members(rights), "out_of": of_members(outs)}
        grid = blocks, -(-rank // _block_r(rank))
        WEIGHTLESS.launch(_lora_gradients_kernel, grid, (len(outs),), {**tensors, "M": tokens}, new)


def _block_r(rank: int) -> int:
    return power_of_two_at_least(rank, least=MIN_DOT, most=64)
