"""The order of a tile's columns, and what it is for: a decoded tile goes through shared memory without conflicts."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from mebp_triton.autotune.emulator.driver import Emulator
from mebp_triton.kernels import accuracy
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.matmul_dx import int4_matmul_dx_triton
from mebp_triton.kernels.weight_tiles import join_planes, to_bank_order, to_column_order

CPU = torch.device("cpu")


@triton.jit
def _orders_kernel(low_ptr, high_ptr, joined_ptr, banks_ptr, back_ptr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Writes the joined planes, ``[ROWS, BLOCK_K]``: as they are, in the other order, and back again."""
    rows = tl.arange(0, ROWS)[:, None]
    plane = rows * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    tile = rows * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    joined = join_planes(tl.load(low_ptr + plane), tl.load(high_ptr + plane))
    tl.store(joined_ptr + tile, joined)
    tl.store(banks_ptr + tile, to_bank_order(joined))
    tl.store(back_ptr + tile, to_column_order(to_bank_order(joined)))


@pytest.mark.parametrize("block_k", [64, 128, 256])
def test_orders_of_columns(block_k):
    columns = torch.arange(3 * block_k, 7 * block_k, dtype=torch.int32).view(4, block_k)
    runs = columns.view(4, -1, 2, 32)
    low, high = (runs[:, :, plane].reshape(4, -1).contiguous() for plane in (0, 1))
    joined, banks, back = (torch.zeros_like(columns) for _ in range(3))
    with Emulator(80):
        _orders_kernel[(1,)](low, high, joined, banks, back, ROWS=4, BLOCK_K=block_k, enable_fp_fusion=False)
    assert torch.equal(joined, columns) and torch.equal(back, columns)
    planes = torch.stack((low, high), 1)
    wanted = planes.view(4, 2, 4, 8).transpose(1, 2) if block_k == 64 else planes
    assert torch.equal(banks, wanted.reshape(4, block_k))


@pytest.mark.parametrize(("bits", "scale_dtype"), [(4, torch.float16), (8, torch.float16), (4, torch.int8)], ids=str)
@pytest.mark.parametrize(
    "config",
    [TileConfig(64, 64, 64, weight_left=True), TileConfig(64, 32, 128, num_stages=3, weight_left=False)],
    ids=["64", "128"],
)
def test_dx_has_no_conflicts_in_shared_memory(config, bits, scale_dtype):
    """Every access takes as few wavefronts as its bytes need: stores and reads of the decoded tile, scales, dY."""
    generator = torch.Generator().manual_seed(0)
    n, k = 4 * config.block_n, 2 * config.block_k
    weight = accuracy.random_weight(n, k, CPU, scale_dtype=scale_dtype, generator=generator, bits=bits)
    dy = torch.zeros(config.block_m, weight.out_features, dtype=torch.bfloat16)
    with Emulator(80, count=True, blocks=lambda grid: np.array([[0, 0, 0]])) as emulator:
        int4_matmul_dx_triton(dy, weight, config=config)
    counts = emulator.launches[0].counts
    assert counts is not None
    for access in counts.to_shared.values():
        # The sums are put in order once, by the epilogue.
        if access.requests >= 4 * config.num_warps:
            assert access.parts == access.least, access.instruction
