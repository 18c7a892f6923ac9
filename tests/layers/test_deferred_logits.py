"""Logits that are recorded instead of computed: exact under what can be recorded, and real logits otherwise."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mebp_triton.layers.deferred_logits import DeferredLogits, OnDemandLogits

V, K = 97, 48


class FloatHead:
    """A head over a float matrix, which writes down whether its logits were asked for."""

    out_features = V

    def __init__(self) -> None:
        self.weight = torch.randn(V, K, generator=torch.Generator().manual_seed(0))
        self.computed = 0

    def logits(self, x: Tensor) -> Tensor:
        self.computed += 1
        return x @ self.weight.t().to(x.dtype)

    def cross_entropy(self, *_: Any) -> Any:
        raise AssertionError("the loss is tested in test_loss")


def deferred(dtype: torch.dtype = torch.float32) -> DeferredLogits:
    hidden = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    return DeferredLogits(hidden, FloatHead(), (1.0,))


CHAINS = {
    "scale": (lambda z: z * 0.5, (0.5,)),
    "scale from the left": (lambda z: 0.5 * z, (0.5,)),
    "quotient": (lambda z: z / 4, (0.25,)),
    "soft-capping": (lambda z: torch.tanh(z / 4.0) * 3.0, (0.25, 3.0)),
    "method": (lambda z: (z / 4.0).tanh().float().contiguous() * 3.0, (0.25, 3.0)),
    "twice": (lambda z: torch.tanh(torch.tanh(z * 0.25) * 2.0) * 5.0, (0.25, 2.0, 5.0)),
    "functions": (lambda z: torch.mul(torch.tanh(torch.div(z, 2)), 2), (0.5, 2.0)),
    "dtype": (lambda z: z.to(torch.float32), (1.0,)),
    "integers": (lambda z: 3 * (z * 2), (6.0,)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_recorded_and_exact(name: str) -> None:
    chain, factors = CHAINS[name]
    logits = deferred()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded = chain(logits)
    assert isinstance(recorded, DeferredLogits) and recorded.factors == factors
    assert logits.factors == (1.0,) and logits.head.computed == 0
    assert torch.allclose(recorded.materialize(), chain(logits.head.logits(logits.hidden)), atol=1e-6)


OPERATIONS = [
    lambda z: z + 1, lambda z: z - 1, lambda z: 1 + z, lambda z: 1 - z, lambda z: -z, lambda z: z**2, lambda z: abs(z),
    lambda z: z[:, 1:], lambda z: list(z)[1], lambda z: 2 / z, lambda z: z > 0, lambda z: z >= 0, lambda z: z < 0,
    lambda z: z <= 0, lambda z: z @ torch.ones(97), lambda z: z * torch.full((97,), 2.0),
    lambda z: z / torch.full((97,), 2.0), lambda z: torch.ones(97) * z, lambda z: torch.ones(97) + z,
    lambda z: z.softmax(-1), lambda z: z.view(-1, 97), lambda z: torch.relu(z), lambda z: torch.clamp(z, min=0),
    lambda z: torch.stack([z, z]), lambda z: torch.where(z > 0, z, 0.0), lambda z: torch.remainder(z, 2.0),
    lambda z: torch.add(z, 2), lambda z: torch.div(z, 2.0, rounding_mode="floor"),
    lambda z: torch.maximum(z, torch.zeros(97)), lambda z: torch.softmax(z, -1), lambda z: torch.tanh(2 + z),
    lambda z: torch.mul(input=z, other=2.0),
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_operations_compute_the_real_logits_and_say_so(operation: Any) -> None:
    logits = deferred()
    with pytest.warns(UserWarning, match=r"so all of them \(\(2, 5, 97\)\) are computed"):
        found = operation(logits)
    assert torch.allclose(found, operation(logits.head.logits(logits.hidden)))


def test_what_is_known_without_the_logits() -> None:
    logits = deferred(torch.bfloat16)
    assert logits.shape == logits.size() == (2, 5, V) and logits.size(-1) == V
    assert logits.dtype == torch.bfloat16 and logits.device.type == "cpu"
    assert logits.head.computed == 0


def test_they_cannot_be_changed_in_place() -> None:
    with pytest.raises(TypeError, match="cannot be changed in place by mul_: call the model with return_logits=True"):
        deferred().mul_(2)
    with pytest.raises(AttributeError):
        deferred().__nothing__  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_on_demand_logits_are_computed_once_and_are_float32_or_wider(dtype: torch.dtype) -> None:
    source = deferred(dtype)
    logits = OnDemandLogits(source)
    wide = torch.promote_types(dtype, torch.float32)
    assert isinstance(logits, Tensor) and (tuple(logits.shape), logits.dtype) == ((2, 5, V), wide)
    assert "OnDemandLogits(shape=(2, 5, 97)" in repr(logits) and source.head.computed == 0
    real = source.materialize().to(wide)
    assert torch.equal(logits.detach(), real)
    assert torch.equal(logits.argmax(-1), real.argmax(-1)) and torch.equal(torch.stack([logits])[0], real)
    assert source.head.computed == 2, "once here, once there"
    assert (logits.numpy() == real.numpy()).all() and (np.asarray(logits) == real.numpy()).all()
    assert logits.tolist() == real.tolist()
    assert logits.sum(-1, dtype=torch.float64).dtype == torch.float64, "an option of an operation is kept"
    logits.mul_(2)
    assert torch.equal(logits + 0, 2 * real)


@pytest.mark.parametrize(
    "read", [lambda z: z.numpy(), lambda z: z.tolist(), np.asarray], ids=["numpy", "list", "array"]
)
def test_on_demand_logits_leave_torch_too(read: Any) -> None:
    source = deferred()
    source.hidden.requires_grad_(True)
    assert np.array_equal(read(OnDemandLogits(source)), source.materialize().detach().numpy())
