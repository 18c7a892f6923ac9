"""The torch.library ops: fakes and autograd agree with what runs, gradients with finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mebp_triton.kernels import ops
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.lora import int4_lora_linear
from torch.library import opcheck

SCHEMES = ("symmetric", "affine", "codebook")


def random_weight(n: int, k: int, scheme: str = "symmetric", group_size: int = 32) -> Int4Weight:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 16, (n, k), generator=generator).to(torch.uint8)
    groups = (-(-k // group_size), n)
    return Int4Weight.from_codes(
        codes,
        torch.randn(groups, generator=generator).half() * 0.1,
        group_size,
        minimum=torch.randn(groups, generator=generator).half() if scheme == "affine" else None,
        codebook=torch.linspace(-1, 1, 16) if scheme == "codebook" else None,
    )


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(scheme: str, extras: bool) -> None:
    weight = random_weight(10, 70, scheme)
    fields: tuple[Any, ...] = ops._fields(weight)
    x, dy = torch.randn(5, 70, requires_grad=True), torch.randn(5, 10, requires_grad=True)
    t, b, a, bias = (torch.randn(shape, requires_grad=True) for shape in ((5, 3), (10, 3), (3, 70), (10,)))
    low_rank = (bias, t, b) if extras else (None, None, None)
    opcheck(ops._matmul, (x, *fields, *low_rank, "panel"))
    opcheck(ops._matmul_dx, (dy, *fields, *((t, a) if extras else (None, None)), "panel"))
    opcheck(ops._embedding, (torch.tensor([[3, 0], [9, 3]]), *fields, torch.float32, "panel"))
    targets = torch.tensor([1, 9, -100, 0, 4])
    head_bias = torch.randn(10) if extras else None
    factors = [0.5, 3.0] if extras else [1.0]
    opcheck(ops._cross_entropy, (x, *fields, targets, head_bias, -100, factors, True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_the_products(scheme: str) -> None:
    torch.manual_seed(0)
    weight = random_weight(6, 40, scheme)
    args = (double(3, 40), double(6), double(3, 2), double(6, 2))
    assert torch.autograd.gradcheck(lambda x, bias, t, b: ops.int4_matmul(x, weight, bias, t, b), args)
    args = (double(3, 6), double(3, 2), double(2, 40))
    assert torch.autograd.gradcheck(lambda dy, g, a: ops.int4_matmul_dx(dy, weight, g, a), args)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_the_lora_layer(scheme: str) -> None:
    torch.manual_seed(0)
    weight = random_weight(6, 40, scheme)
    args = (double(2, 3, 40), double(6), double(2, 40), double(6, 2))
    assert torch.autograd.gradcheck(lambda x, bias, a, b: int4_lora_linear(x, weight, bias, a, b, 1.7), args)


@pytest.mark.parametrize("factors", [(1.0,), (0.3,), (0.5, 2.0), (0.5, 1.5, 3.0)])
def test_gradients_of_the_loss(factors: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    weight, bias = random_weight(11, 40), torch.randn(11, dtype=torch.float64)
    targets = torch.tensor([3, -100, 10, 0])

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return ops.int4_cross_entropy(hidden, weight, targets, bias, factors=factors)[0]

    assert torch.autograd.gradcheck(loss, (double(4, 40),))


def test_gradients_under_autocast_in_backward() -> None:
    weight = random_weight(64, 128)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        tensors = [torch.randn(s, requires_grad=True) for s in ((32, 128), (4, 128), (64, 4))]
        y = int4_lora_linear(tensors[0], weight, None, tensors[1], tensors[2], 1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y.square().sum().backward()
        found.append([tensor.grad for tensor in tensors])
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_leading_dimensions_and_empty_batches() -> None:
    weight = random_weight(10, 70)
    x = torch.randn(2, 3, 70)
    y = ops.int4_matmul(x, weight)
    assert y.shape == (2, 3, 10) and torch.equal(y.view(6, 10), ops.int4_matmul(x.view(6, 70), weight))
    assert ops.int4_matmul(torch.empty(0, 70), weight).shape == (0, 10)
    assert ops.int4_matmul_dx(torch.empty(2, 0, 10), weight).shape == (2, 0, 70)


def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = random_weight(10, 70)
    with pytest.raises(ValueError, match="x must have 70 columns, got shape"):
        ops.int4_matmul(torch.randn(5, 64), weight)
    with pytest.raises(ValueError, match="dy must have 10 columns"):
        ops.int4_matmul_dx(torch.randn(5, 70), weight)
    with pytest.raises(ValueError, match="backend must be one of auto, triton, panel, got 'cuda'"):
        ops.resolve_backend("cuda", torch.device("cpu"))
    with pytest.raises(ValueError, match="runs on a GPU"):
        ops.resolve_backend("triton", torch.device("cpu"))
    assert ops.resolve_backend("auto", torch.device("cpu")) == "panel"
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        ops.resolve_backend("triton", torch.device("cuda"))
    assert ops.resolve_backend("auto", torch.device("cuda")) == "panel"
