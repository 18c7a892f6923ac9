"""``act(gate) · up`` against plain torch: activations, shapes, layouts, and where an activation ends."""

import functools

import pytest
import torch
from interpreted import DTYPES
from pairs import pairs
from small_operations import check

from mebp_triton.kernels import reference
from mebp_triton.kernels.gated_activation import (
    BLOCK,
    gated_activation,
    gated_activation_backward_triton,
    gated_activation_triton,
    takes,
)

pytestmark = pytest.mark.usefixtures("triton_kernels")
KINDS = ("silu", "gelu_tanh", "gelu")
SHAPES = ((5, 96), (1,), (2, 3, 7), (1, BLOCK), (2, BLOCK + 3))


def both(kind):
    return tuple(functools.partial(one, kind=kind) for one in (gated_activation, reference.gated_activation))


@pytest.mark.parametrize(("kind", "shape", "dtype"), pairs(KINDS, SHAPES, DTYPES), ids=str)
def test_as_in_plain_torch(normal, kind, shape, dtype):
    # Torch's GELU has no right digit left below -5, where its sum cancels.
    inputs = [2 * normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=2)]
    check(*both(kind), inputs, to_the_digit=kind == "silu")


@pytest.mark.parametrize("kind", KINDS)
def test_far_from_zero(device, kind):
    """Where an exponential overflows, and where an activation is its argument or nothing."""
    gate = torch.tensor([-1e4, -200.0, -90.0, -20.0, -4.0, -0.0, 0.0, 4.0, 20.0, 90.0, 200.0, 1e4], device=device)
    check(*both(kind), [gate, torch.full_like(gate, 0.5)])


@pytest.mark.parametrize(
    "view",
    [
        lambda wide: wide.view(10, 32)[:, :16],
        lambda wide: wide.view(10, 32)[::2],
        lambda wide: wide.view(10, 32)[:, ::2],
        lambda wide: wide.view(10, 32).t(),
        lambda wide: wide.view(2, 10, 16).transpose(0, 1),
    ],
    ids=["half", "row-step", "column-step", "transposed", "tokens-first"],
)
def test_strides(normal, view):
    """Halves of one product are gate and up in some models."""
    gate = view(normal(320))
    y, *_ = check(*both("silu"), [gate, normal(*gate.shape, seed=2)])
    check(*both("silu"), [normal(*gate.shape, seed=2), gate])
    assert y.is_contiguous()


def test_only_the_outputs_are_written(guarded, normal, dtype):
    gate, up, dy = (normal(5, 100, dtype=dtype, seed=seed) for seed in range(3))
    assert guarded(gated_activation_triton, gate, up).isfinite().all()
    for gradient in guarded(gated_activation_backward_triton, dy, gate, up):
        assert gradient.isfinite().all()


def test_nothing_but_gate_and_up_is_kept(normal):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gate, up = normal(4, 8).requires_grad_(True), normal(4, 8, seed=2).requires_grad_(True)
        gated_activation(gate, up)
    assert {tensor.data_ptr() for tensor in kept} == {gate.data_ptr(), up.data_ptr()}


def test_an_empty_batch(normal):
    gate = torch.empty(0, 16, device=normal(1).device).requires_grad_(True)
    y = gated_activation(gate, gate.detach())
    (dgate,) = torch.autograd.grad(y.sum(), gate)
    assert y.shape == dgate.shape == gate.shape


def test_offsets_beyond_31_bits(normal, sparse, device):
    if device == "cuda":
        pytest.skip("addresses without memory behind them exist on the CPU only")
    gate, up = normal(5, 64), normal(5, 64, seed=2)
    far = sparse(4 * 2**31 + 64 * 4).view(torch.float32).as_strided((5, 64), (2**29, 1))
    far.copy_(gate)
    assert torch.equal(gated_activation_triton(far, up), gated_activation_triton(gate, up))
    near = gated_activation_backward_triton(gate, gate, up)
    assert all(map(torch.equal, gated_activation_backward_triton(far, far, up), near))


def test_what_it_takes():
    gate = torch.zeros(2, 8)
    assert takes(gate, gate) and not takes(gate, gate.half()) and not takes(gate, gate[:1])
    assert not takes(gate.double(), gate.double()) and not takes(gate.sum(), gate.sum())
