"""RMSNorm's kernels against plain torch: styles, shapes, layouts, and magnitudes at which eps shows."""

import functools

import pytest
import torch
from interpreted import DTYPES
from pairs import pairs
from small_operations import check

from mebp_triton.kernels import reference
from mebp_triton.kernels.rms_norm import MOST_COLUMNS, rms_norm, rms_norm_dx_triton, rms_norm_triton, takes

pytestmark = pytest.mark.usefixtures("triton_kernels")
STYLES = ("twice", "once", "offset")
SHAPES = ((5, 96), (1, 3), (2, 3, 4, 16), (3, 2, 577), (7,), (40, 128))


def both(style, eps=1e-5):
    """The kernel and its twin, of an input and the weight."""
    return tuple(functools.partial(one, eps=eps, style=style) for one in (rms_norm, reference.rms_norm))


@pytest.mark.parametrize(("style", "shape", "dtype"), pairs(STYLES, SHAPES, DTYPES), ids=str)
def test_as_in_plain_torch(normal, style, shape, dtype):
    check(*both(style), [normal(*shape, dtype=dtype)], [normal(shape[-1], dtype=dtype, seed=2)])


@pytest.mark.parametrize(("eps", "size"), [(1e-5, 1e-3), (1e-6, 1e-3), (0.1, 1.0), (1e-5, 1e4)])
def test_magnitudes(normal, dtype, eps, size):
    check(*both("twice", eps), [normal(6, 64, dtype=dtype) * size], [normal(64, dtype=dtype, seed=2)])


def test_a_row_of_zeros(normal, device):
    """Its factor is the largest there is, and it has a gradient."""
    found = check(*both("once"), [torch.zeros(2, 16, device=device)], [normal(16)])
    assert not found[0].any() and found[1].isfinite().all() and found[1].any()


@pytest.mark.parametrize(
    "view",
    [
        lambda wide: wide.view(2, 10, 4, 16).transpose(1, 2),
        lambda wide: wide.view(2, 10, 64).transpose(0, 1),
        lambda wide: wide.view(2, 10, 4, 16).permute(1, 2, 0, 3),
        lambda wide: wide.view(20, 64)[::2, 8:40],
        lambda wide: wide.view(20, 64)[:, ::2],
        lambda wide: wide.view(20, 64).t(),
        lambda wide: wide.view(20, 64)[:1].expand(9, 64),
        lambda wide: wide[::2],
    ],
    ids=["heads", "tokens-first", "cycle", "rows", "column-step", "transposed", "stride-0", "one-row"],
)
def test_strides(normal, view):
    x = view(normal(1280))
    weight = normal(2 * x.shape[-1], seed=2)[::2]
    y, dx = check(*both("twice"), [x], [weight])
    if x.stride(-1) == 1 and 0 not in x.stride() and x.numel() == 1280:
        assert y.stride() == dx.stride() == x.stride(), "a layer before it would have to copy the gradient"


def test_only_the_output_is_written(guarded, normal, dtype):
    x, weight, dy = normal(5, 100, dtype=dtype), normal(100, dtype=dtype, seed=2), normal(5, 100, dtype=dtype, seed=3)
    assert guarded(rms_norm_triton, x, weight, 1e-5).isfinite().all()
    assert guarded(rms_norm_dx_triton, dy, x, weight, 1e-5).isfinite().all()


def test_an_empty_batch(normal):
    x = torch.empty(0, 3, 16, device=normal(1).device).requires_grad_(True)
    y = rms_norm(x, normal(16), 1e-5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == dx.shape == x.shape


def test_offsets_beyond_31_bits(normal, sparse, device):
    if device == "cuda":
        pytest.skip("addresses without memory behind them exist on the CPU only")
    x, weight = normal(5, 64), normal(64, seed=2)
    far = sparse(4 * 2**31 + 64 * 4).view(torch.float32).as_strided((5, 64), (2**29, 1))
    far.copy_(x)
    assert torch.equal(rms_norm_triton(far, weight, 1e-5), rms_norm_triton(x, weight, 1e-5))
    assert torch.equal(rms_norm_dx_triton(far, far, weight, 1e-5), rms_norm_dx_triton(x, x, weight, 1e-5))


def test_what_it_takes():
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    assert takes(x, weight)
    assert not takes(x.double(), weight.double()) and not takes(x.half(), weight)
    assert not takes(x, weight.clone().requires_grad_(True)) and not takes(x, torch.zeros(4))
    assert not takes(torch.zeros(1, 2 * MOST_COLUMNS), torch.zeros(2 * MOST_COLUMNS))


def test_a_second_derivative_is_refused(normal):
    x = normal(2, 8).requires_grad_(True)
    (dx,) = torch.autograd.grad(rms_norm(x, normal(8), 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
