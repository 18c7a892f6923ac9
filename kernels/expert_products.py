"""The products of a mixture's experts in one launch: rows that are sorted by expert, each expert's by its own weight.

A program computes one tile, as those of ``matmul`` and ``matmul_dx`` do. It reads from a table (``expert_table``) which
rows these are, and by which weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Kernel, TileConfig, default_config
from .expert_table import COLUMNS, END, EXPERT, FIRST, Experts, lora_arguments, of_expert
from .launch import WEIGHTLESS, in_words
from .product_tiles import add_dx_lora, add_lora, dx_tile, product_tile
from .weight_tiles import to_column_order, weight_of


@triton.jit
def _expert_matmul_kernel(
    x_ptr,
    tensors,
    table_ptr,
    t_ptr,
    b_ptr,
    y_ptr,
    TILES,
    N,
    K,
    R,
    strides,
    x_strides,
    t_strides,
    b_strides,
    stride_be,
    FORM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    HAS_LORA: tl.constexpr,
    MASK_K: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``Y_i = X_i·W_iᵀ + t_i·b_iᵀ`` for the rows of each expert i; one tile of Yᵀ per program.

    x_ptr: ``[S, K]``, sorted by expert. y_ptr: ``[S, N]``, contiguous.
    tensors: the storage of all weights ``W_i[N, K]``, once for each of their tensors, in the tensor's dtype; and
        strides: as ``weight_of`` takes them, for a group of one.
    table_ptr: ``[TILES, COLUMNS]`` int64, see ``expert_table``. TILES: of all experts together.
    t_ptr: ``[S, R]``, LoRA's scaled ``X_i·A_iᵀ``. b_ptr: ``[experts, N, R]``, LoRA's B of each.
    FORM: ``(BITS, GROUP, HAS_MINIMUM)``. ALIGNED: all tensors begin at multiples of ALIGNMENT.
    SCALE_SUMS, STAGES, THREADS: see ``matmul``.
    """
    pid = tl.program_id(0)
    # Neighbouring programs share a tile of a weight, which is read from memory once and then from the cache.
    row_ptr = table_ptr + pid % TILES * COLUMNS
    rows_m = tl.load(row_ptr + FIRST) + tl.arange(0, BLOCK_M)
    mask_m = rows_m < tl.load(row_ptr + END)
    offs_n = pid // TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weights, codebook_ptr = of_expert(tensors, row_ptr, FORM[2], HAS_CODEBOOK, ALIGNED)
    weight, weight_strides = weight_of(weights, strides, 0, FORM[2], 1)
    acc = product_tile(
        x_ptr,
        x_strides,
        rows_m,
        mask_m,
        weight,
        weight_strides,
        codebook_ptr,
        offs_n,
        mask_n,
        (0, K),
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
    if HAS_LORA:
        acc = add_lora(
            acc,
            (t_ptr, b_ptr + tl.load(row_ptr + EXPERT) * stride_be),
            (t_strides, b_strides),
            rows_m,
            mask_m,
            offs_n.to(tl.int64),
            mask_n,
            0,
            (R, R),
            x_ptr.dtype.element_ty,
            BLOCK_R,
        )
    tl.store(
        y_ptr + rows_m[None, :] * N + offs_n[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[None, :] & mask_n[:, None],
    )


@triton.jit
def _expert_matmul_dx_kernel(
    dy_ptr,
    tensors,
    table_ptr,
    g_ptr,
    a_ptr,
    dx_ptr,
    TILES,
    N,
    K,
    R,
    strides,
    dy_strides,
    g_strides,
    a_strides,
    stride_ae,
    FORM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    HAS_LORA: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``dX_i = dY_i·W_i + g_i·a_i`` for the rows of each expert i; one tile of dX per program.

    dy_ptr: ``[S, N]``, sorted by expert. dx_ptr: ``[S, K]``, contiguous.
    g_ptr: ``[S, R]``, LoRA's scaled ``dY_i·B_i``. a_ptr: ``[experts, R, K]``, LoRA's A of each.
    WEIGHT_LEFT, STAGES, THREADS: see ``matmul_dx``. All others: see ``_expert_matmul_kernel``.
    """
    pid = tl.program_id(0)
    row_ptr = table_ptr + pid % TILES * COLUMNS
    rows_m = tl.load(row_ptr + FIRST) + tl.arange(0, BLOCK_M)
    mask_m = rows_m < tl.load(row_ptr + END)
    k0 = pid // TILES * BLOCK_K
    columns = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
    mask_k = columns < K
    steps = (N + BLOCK_N - 1) // BLOCK_N
    weights, codebook_ptr = of_expert(tensors, row_ptr, FORM[2], HAS_CODEBOOK, ALIGNED)
    acc = dx_tile(
        (dy_ptr,),
        ((dy_strides[0],), dy_strides[1]),
        rows_m,
        mask_m,
        weights,
        strides,
        (codebook_ptr,),
        (0, steps),
        (steps, steps, steps),
        (N,),
        k0,
        K,
        FORM,
        HAS_CODEBOOK,
        1,
        WEIGHT_LEFT,
        ASM,
        STAGES,
        THREADS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if HAS_LORA:
        acc = add_dx_lora(
            acc,
            (g_ptr, a_ptr + tl.load(row_ptr + EXPERT) * stride_ae),
            (g_strides, a_strides),
            rows_m,
            mask_m,
            columns,
            mask_k,
            (R, R),
            dy_ptr.dtype.element_ty,
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


def expert_matmul_arguments(
    x: Tensor, experts: Experts, table: Tensor, t: Tensor | None, b: Tensor | None, y: Tensor, config: TileConfig
) -> dict[str, Any]:
    """The arguments of ``_expert_matmul_kernel``, by name; the tensors may lie on the meta device."""
    return {
        "x_ptr": x,
        "tensors": experts.tensors,
        "table_ptr": table,
        "y_ptr": y,
        "TILES": table.shape[0],
        "x_strides": x.stride(),
        "MASK_K": experts.head.in_features % config.block_k != 0,
        "SCALE_SUMS": config.scale_sums,
        **experts.arguments(config, _expert_matmul_kernel),
        **lora_arguments("tb", t, b),
    }


def expert_matmul_dx_arguments(
    dy: Tensor, experts: Experts, table: Tensor, g: Tensor | None, a: Tensor | None, dx: Tensor, config: TileConfig
) -> dict[str, Any]:
    """The arguments of ``_expert_matmul_dx_kernel``, by name; the tensors may lie on the meta device."""
    shared = experts.arguments(config, _expert_matmul_dx_kernel)
    if experts.aligned and in_words([experts.head]):
        shared["THREADS"] = -1
    return {
        "dy_ptr": dy,
        "tensors": experts.tensors,
        "table_ptr": table,
        "dx_ptr": dx,
        "TILES": table.shape[0],
        "dy_strides": dy.stride(),
        "WEIGHT_LEFT": config.weight_left,
        **shared,
        **lora_arguments("ga", g, a),
    }


def int4_expert_products_triton(
    x: Tensor,
    experts: Experts,
    rows: Sequence[int],
    t: Tensor | None = None,
    b: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Computes ``Y_i = X_i·W_iᵀ + t_i·b_iᵀ`` for the rows of each expert i.

    Args:
        x: ``[S, K]`` float32, float16 or bfloat16, any strides: the rows of the first expert, then of the second, ...
        experts: the weights ``W_i[N, K]``. rows: how many rows of x each of them has; S in all.
        t: ``[S, R]``, LoRA's scaled ``X_i·A_iᵀ``. Like ``b``, it is rounded to x's dtype.
        b: ``[experts, N, R]``, LoRA's B of each.
        config: tile sizes, of which ``split`` must be 1; the default if not given.

    Returns:
        ``[S, N]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the configuration does not suit.
    """
    n, k = experts.head.shape
    names, shapes = ("x", "t", "b"), ((sum(rows), k), (sum(rows),), (experts.count, n))
    experts.check(rows, names, shapes, x, t, b)
    y = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)

    def arguments(table: Tensor, config: TileConfig) -> dict[str, Any]:
        return expert_matmul_arguments(x, experts, table, t, b, y, config)

    operands = {"x_ptr": x, "t_ptr": t, "b_ptr": b, "y_ptr": y}
    _launch("matmul", _expert_matmul_kernel, experts, rows, operands, y, arguments, config)
    return y


def int4_expert_products_dx_triton(
    dy: Tensor,
    experts: Experts,
    rows: Sequence[int],
    g: Tensor | None = None,
    a: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Computes ``dX_i = dY_i·W_i + g_i·a_i`` for the rows of each expert i.

    Args:
        dy: ``[S, N]``, in the order of ``int4_expert_products_triton``. experts, rows, config: as there.
        g: ``[S, R]``, LoRA's scaled ``dY_i·B_i``. Like ``a``, it is rounded to dy's dtype.
        a: ``[experts, R, K]``, LoRA's A of each.

    Returns:
        ``[S, K]`` in dy's dtype.

    Raises:
        ValueError: as there.
    """
    n, k = experts.head.shape
    names, shapes = ("dy", "g", "a"), ((sum(rows), n), (sum(rows),), (experts.count, k))
    experts.check(rows, names, shapes, dy, g, None if a is None else a.transpose(1, 2))
    dx = torch.empty((dy.shape[0], k), dtype=dy.dtype, device=dy.device)

    def arguments(table: Tensor, config: TileConfig) -> dict[str, Any]:
        return expert_matmul_dx_arguments(dy, experts, table, g, a, dx, config)

    operands = {"dy_ptr": dy, "g_ptr": g, "a_ptr": a, "dx_ptr": dx}
    _launch("matmul_dx", _expert_matmul_dx_kernel, experts, rows, operands, dx, arguments, config)
    return dx


def _launch(
    name: Kernel,
    kernel: Any,
    experts: Experts,
    rows: Sequence[int],
    operands: dict[str, Any],
    out: Tensor,
    arguments: Callable[[Tensor, TileConfig], dict[str, Any]],
    config: TileConfig | None,
) -> None:
    """Launches over all tiles of ``out``, if it has any."""
    if not out.numel():
        return
    problem = experts.problem(name, out.shape[0], out.dtype)
    config = config or default_config(problem)
    table = experts.table(rows, config.block_m)

    def new() -> tuple[dict[str, Any], dict[str, Any]]:
        if config.split != 1 or not config.suits(problem):
            raise ValueError(f"{config} does not suit {problem} over experts")
        return arguments(table, config), config.launch_options()

    across, block = out.shape[1], config.block_n if name == "matmul" else config.block_k
    grid = (table.shape[0] * -(-across // block),)
    operands |= {"tensors": experts.tensors, "table_ptr": table, "TILES": table.shape[0]}
    WEIGHTLESS.launch(kernel, grid, (config, experts.key), operands, new)
