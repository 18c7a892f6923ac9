"""The language-model head: in place as a whole, or read segment by segment, and as a plain float layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_layers import make_weight
from models import batch, randomize_adapter

import mebp_triton as mebp
from mebp_triton.kernels import reference
from mebp_triton.kernels.functions import int4_matmul_dx
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.layers import int4_module
from mebp_triton.layers.deferred_logits import DeferredLogits
from mebp_triton.layers.head import Int4Head

V, K = 97, 48
WEIGHT = make_weight(V, K)
BIAS = torch.randn(V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Segments:
    """A table that gives its rows out 40 at a time."""

    def __init__(self, weight: Int4Weight) -> None:
        self.weight = weight

    def segments(self) -> Any:
        return ((first, self.weight.rows(first, first + 40)) for first in (0, 40, 80))

    def gather(self, ids: torch.Tensor) -> Int4Weight:
        return self.weight.gather(ids.reshape(-1))


def head(with_bias: bool, in_segments: bool, dtype: torch.dtype = torch.float64) -> Int4Head:
    bias = BIAS.to(dtype) if with_bias else None
    if not in_segments:
        return Int4Head(WEIGHT, bias, dtype)
    made = Int4Head(WEIGHT.to("meta"), bias, dtype)  # as on a GPU: only the rows are there
    made.rows, made.device = Segments(WEIGHT), torch.device("cpu")
    return made


def product(x: torch.Tensor, with_bias: bool) -> torch.Tensor:
    return reference.matmul(x, WEIGHT, BIAS if with_bias else None)


def hidden(*lead: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*lead, K, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_(True)


@pytest.mark.parametrize(
    ("rows", "with_bias", "in_segments"), [(16, True, True), (97, False, False), (4096, True, False), (40, False, True)]
)
def test_logits_and_the_plain_layer_it_can_become(
    rows: int, with_bias: bool, in_segments: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4_module, "DECODED_ROWS", rows)
    made, x = head(with_bias, in_segments), hidden(3)
    truth = product(x, with_bias)
    dy = torch.randn(3, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected,) = torch.autograd.grad(truth, x, dy)
    for layer in (made, made.decoded()):
        y = layer(x)
        torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], expected, rtol=1e-11, atol=1e-11)
        assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("in_segments", [True, False])
@pytest.mark.parametrize("most", [None, 2, 4])
def test_cross_entropy(with_bias: bool, in_segments: bool, most: int | None) -> None:
    """Losses, the likeliest tokens, and the gradient, which each loss may weigh on its own; by chunks of tokens too."""
    made, x = head(with_bias, in_segments), hidden(6)
    targets = torch.tensor([0, 39, -100, 40, 96, 5])
    losses, argmax = made.cross_entropy(x, targets, -100, (0.5, 3.0), most)
    logits = torch.tanh(product(x, with_bias) * 0.5) * 3.0
    truth = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses, truth, rtol=1e-12, atol=1e-12)
    expected = logits.argmax(-1).masked_fill(targets == -100, -1)
    assert torch.equal(argmax, expected) and not argmax.requires_grad
    weights = torch.arange(6.0, dtype=torch.float64)
    ours, exact = (torch.autograd.grad((loss * weights).sum(), x)[0] for loss in (losses, truth))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_by_chunks_of_tokens_a_head_is_walked_once() -> None:
    made, x, walks = head(False, True), hidden(6), []
    assert isinstance(made.rows, Segments)
    segments = made.rows.segments
    made.rows.segments = lambda: walks.append(1) or segments()  # type: ignore[method-assign,func-returns-value]
    with torch.no_grad():  # then there is no gradient to put together
        losses, _ = made.cross_entropy(x, torch.arange(6), -100, (1.0,), 4)
        assert len(walks) == 1 and torch.equal(
            losses[4:], made.cross_entropy(x[4:], torch.arange(4, 6), -100, (1.0,))[0]
        )


@pytest.mark.parametrize("in_segments", [True, False])
def test_gradients_have_the_dtype_of_the_hidden_state_and_are_added_up_in_float32(in_segments: bool) -> None:
    made, x = head(False, in_segments, torch.bfloat16), hidden(3, dtype=torch.bfloat16)
    dy = torch.randn(3, V, generator=torch.Generator().manual_seed(1)).bfloat16()
    (through_logits,) = torch.autograd.grad(made(x), x, dy)
    (through_loss,) = torch.autograd.grad(made.cross_entropy(x, torch.arange(3), -100, (1.0,))[0].sum(), x)
    assert through_logits.dtype == through_loss.dtype == torch.bfloat16
    if in_segments:
        parts = [int4_matmul_dx(dy[:, at : at + 40].contiguous(), WEIGHT.rows(at, at + 40)) for at in (0, 40, 80)]
        assert torch.equal(through_logits, sum(part.float() for part in parts).bfloat16())


@pytest.mark.parametrize("in_segments", [True, False])
def test_the_loss_is_not_computed_under_autocast(in_segments: bool) -> None:
    made, x, targets = head(True, in_segments, torch.float32), hidden(3, dtype=torch.float32), torch.arange(3)
    losses = made.cross_entropy(x, targets, -100, (1.0,))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.cross_entropy(x, targets, -100, (1.0,))[0], losses)


@pytest.mark.parametrize("in_segments", [True, False])
def test_the_backend_is_the_heads(in_segments: bool) -> None:
    made, x = head(True, in_segments), hidden(3)
    logits = made(x)
    made.backend = "none"
    for compute in (
        lambda: made(x),
        lambda: made.cross_entropy(x, torch.arange(3), -100, (1.0,)),
        lambda: logits.sum().backward() if in_segments else made(x),
    ):
        with pytest.raises(ValueError, match="backend"):
            compute()


def test_gradients_of_segments_have_no_gradients_of_their_own() -> None:
    made, x = head(True, True), hidden(3)
    for value in (made(x).square().sum(), made.cross_entropy(x, torch.arange(3), -100, (1.0,))[0].square().sum()):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_a_deferred_head_returns_what_was_asked_of_it() -> None:
    made, x = head(True, False), hidden(2, 3)
    made.deferred = True
    logits = made(x)
    assert isinstance(logits, DeferredLogits) and logits.hidden is x and logits.factors == (1.0,)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("architecture", "weights"),  # a tied head, a capped one, one with a bias
    [("llama", "device"), ("gemma3_text", "file"), ("phi", "device"), ("llama", "file")],
)
def test_a_float_head_is_a_plain_layer_with_the_decoded_weight(
    shared_store: Any, architecture: str, weights: Any
) -> None:
    store = shared_store(architecture)
    config = mebp.LoraConfig(r=4)
    ours = mebp.load(store, config, weights=weights).train()
    model = mebp.load(store, config, weights=weights, head="float").train()
    plain = model.get_output_embeddings()
    assert type(plain) is torch.nn.Linear and not plain.weight.requires_grad
    losses = []
    for one in (ours, model):
        randomize_adapter(one)
        losses.append(one(**batch()).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for (name, found), truth in zip(model.named_parameters(), ours.parameters(), strict=False):
        if found.requires_grad:
            torch.testing.assert_close(found.grad, truth.grad, rtol=1e-4, atol=1e-7, msg=name)
    with torch.no_grad():
        x = torch.randn(3, plain.in_features)
        torch.testing.assert_close(plain(x), ours.get_output_embeddings().logits(x))


def test_a_head_of_another_kind_is_refused(shared_store: Any) -> None:
    with pytest.raises(ValueError, match="head must be int4 or float, got 'bf16'"):
        mebp.load(shared_store("llama"), head="bf16")  # type: ignore[arg-type]
