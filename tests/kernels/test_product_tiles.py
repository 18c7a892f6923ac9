"""One tile of a product: the sums over parts of a reduction are together those over all of it."""

import pytest
import torch
import triton
import triton.language as tl

from mebp_triton.kernels import matmul, product_tiles, reference, weight_tiles

pytestmark = pytest.mark.usefixtures("triton_kernels")


@triton.jit
def _forward_kernel(x_ptr, packed_ptr, scales_ptr, y_ptr, first, last, K: tl.constexpr):
    """Columns ``first`` to ``last`` of ``X[16, K]·Wᵀ``, transposed, for a weight of 16 rows."""
    offs = tl.arange(0, 16)
    all_rows = offs < 16
    tensors = (packed_ptr, scales_ptr, scales_ptr, scales_ptr, scales_ptr)
    strides = ((K // 2, 1), (16, 1), (16, 1), (16, 1), (16, 1))
    acc = product_tiles.product_tile(
        x_ptr,
        (K, 1),
        offs,
        all_rows,
        tensors,
        strides,
        scales_ptr,
        offs,
        all_rows,
        (first, last),
        K,
        (4, 64, False),
        False,
        False,
        False,
        False,
        1,
        128,
        16,
        16,
        64,
    )
    tl.store(y_ptr + offs[None, :] * 16 + offs[:, None], acc)


@triton.jit
def _backward_kernel(dy_ptr, packed_ptr, scales_ptr, dx_ptr, first, last, N, K: tl.constexpr):
    """Steps ``first`` to ``last``, of 16 rows each, of ``dY[16, N]·W``: its first 64 columns."""
    offs = tl.arange(0, 16)
    columns = tl.arange(0, 64)
    of_one = ((packed_ptr,), (scales_ptr,), (scales_ptr,), (scales_ptr,), (scales_ptr,))
    strides = ((K // 2, 1), ((N,), 1), ((N,), 1), ((N,), 1), ((N,), 1))
    acc = product_tiles.dx_tile(
        (dy_ptr,),
        ((N,), 1),
        offs,
        offs < 16,
        of_one,
        strides,
        (scales_ptr,),
        (first, last),
        (last, last, last),
        (N,),
        0,
        K,
        (4, 64, False),
        False,
        1,
        False,
        False,
        1,
        128,
        16,
        16,
        64,
    )
    acc = weight_tiles.to_column_order(acc)
    tl.store(dx_ptr + offs[:, None] * 64 + columns[None, :], acc)


@pytest.fixture
def launch(device):
    """``launch(kernel, *arguments)``: by the interpreter, unless there is a GPU."""

    def run(kernel, *arguments):
        if device != "cuda":
            kernel = type(matmul._matmul_kernel)(kernel.fn)
        kernel[(1,)](*arguments)

    return run


@pytest.mark.parametrize(("first", "last"), [(0, 64), (64, 128), (0, 128), (64, 64)])
def test_a_span_of_columns(launch, make_weight, normal, device, first, last):
    weight, x = make_weight(16, 128), normal(16, 128)
    y = torch.full((16, 16), float("nan"), device=device)
    launch(_forward_kernel, x, weight.packed, weight.scales, y, first, last, 128)
    part = x.double()[:, first:last] @ reference.decode(weight)[:, first:last].t()
    torch.testing.assert_close(y.double(), part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (0, 3), (2, 2)])
def test_a_span_of_steps(launch, make_weight, normal, device, first, last):
    """The last step of three ends behind the last row."""
    weight, dy = make_weight(40, 128), normal(16, 40)
    dx = torch.full((16, 64), float("nan"), device=device)
    launch(_backward_kernel, dy, weight.packed, weight.scales, dx, first, last, 40, 128)
    rows = slice(16 * first, min(16 * last, 40))
    part = dy.double()[:, rows] @ reference.decode(weight)[rows, :64]
    torch.testing.assert_close(dx.double(), part, rtol=1e-5, atol=1e-5)
