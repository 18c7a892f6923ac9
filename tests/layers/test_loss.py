"""The one-pass loss under transformers' own forward."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from models import batch, decoded_model, our_gradients, randomize_adapter, relative_rms, tiny_store

import mebp_triton as mebp
from mebp_triton.kernels import reference
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.layers import head as head_module
from mebp_triton.layers import loss
from mebp_triton.layers.deferred_logits import DeferredLogits


@pytest.fixture(scope="module")
def store() -> Any:
    return tiny_store("llama")


@pytest.fixture
def model(store: Any) -> Any:
    loaded = mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8))
    randomize_adapter(loaded)
    return loaded


def deferred(model: Any) -> DeferredLogits:
    return DeferredLogits(torch.randn(2, 5, 48), model.get_output_embeddings(), (1.0,))


def test_no_logits_unless_asked_for(model: Any) -> None:
    out = model(**batch())
    assert "logits" not in out and out.logits is None
    assert isinstance(model.get_output_embeddings()(torch.ones(2, 48)), torch.Tensor), "only within the model's forward"
    asked = model(**batch(), return_logits=True)
    assert asked.logits.shape == (2, 20, 97)
    assert abs(asked.loss.item() - out.loss.item()) < 1e-5
    assert model(input_ids=batch()["input_ids"]).logits.shape == (2, 20, 97)


def test_gradients_are_the_same_with_logits(model: Any) -> None:
    found = []
    for options in ({}, {"return_logits": True}):
        model.zero_grad()
        model(**batch(), **options).loss.backward()
        found.append(our_gradients(model))
    assert all(relative_rms(found[0][name], found[1][name]) < 1e-5 for name in found[0])


CHAINS = {
    "scale": lambda z: z * 0.5,
    "scale from the left": lambda z: 0.5 * z,
    "quotient": lambda z: z / 4,
    "soft-capping": lambda z: torch.tanh(z / 3.0) * 3.0,
    "method": lambda z: (z / 3.0).tanh().float().contiguous() * 3.0,
    "twice": lambda z: torch.tanh(torch.tanh(z * 0.2) * 2.0) * 5.0,
    "functions": lambda z: torch.mul(torch.tanh(torch.div(z, 2)), 2),
    "dtype": lambda z: z.to(torch.float32),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_recorded_and_exact(model: Any, name: str) -> None:
    logits = deferred(model)
    labels = torch.randint(0, 97, (2, 5))
    logits.hidden.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chained = CHAINS[name](logits)
    assert isinstance(chained, DeferredLogits)
    loss = model.mebp.loss(chained, labels)
    (grad,) = torch.autograd.grad(loss, logits.hidden)
    hidden = logits.hidden.detach().requires_grad_(True)
    real = CHAINS[name](model.get_output_embeddings().logits(hidden))
    truth = torch.nn.functional.cross_entropy(real[:, :-1].reshape(-1, 97), labels[:, 1:].reshape(-1))
    (truth_grad,) = torch.autograd.grad(truth, hidden)
    assert abs(loss.item() - truth.item()) < 1e-5
    assert relative_rms(grad, truth_grad) < 1e-5
    assert torch.allclose(chained.materialize(), real, atol=1e-6)


@pytest.mark.parametrize(
    "operation",
    [lambda z: z + 1, lambda z: z - 1, lambda z: z[:, 1:], lambda z: torch.relu(z), lambda z: z.softmax(-1),
     lambda z: z * torch.ones(97), lambda z: z.view(-1, 97), lambda z: torch.clamp(z, min=0)],
)  # fmt: skip
def test_other_operations_make_the_real_logits_and_say_so(model: Any, operation: Any) -> None:
    logits = deferred(model)
    with pytest.warns(UserWarning, match="all of them"):
        found = operation(logits)
    assert torch.allclose(found, operation(model.get_output_embeddings().logits(logits.hidden)))


def test_a_model_that_does_something_else_gets_the_same_loss(store: Any, model: Any) -> None:
    def bent(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(*args, **kwargs).last_hidden_state
        return type(out)(loss=self.loss_function(self.lm_head(hidden).abs(), labels, vocab_size=97))

    out = model(**batch())
    truth = decoded_model(store)
    from models import peft_model

    wrapped = peft_model(store, model, r=4, lora_alpha=8).base_model.model
    model.forward = bent.__get__(model)
    with pytest.warns(UserWarning, match="abs"):
        ours = model(**batch()).loss
    theirs = bent(wrapped, **batch()).loss
    assert truth is not None and abs(ours.item() - theirs.item()) < 1e-5


def test_a_batch_without_a_target_has_loss_and_gradients_zero(model: Any) -> None:
    examples = batch()
    examples["labels"] = torch.full_like(examples["labels"], -100)
    loss = model(**examples).loss
    loss.backward()
    assert loss.item() == 0
    assert all(grad is not None and not grad.any() for grad in our_gradients(model).values())
    one_token = {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[5]])}
    assert model(**one_token).loss.item() == 0


def test_normalization(model: Any) -> None:
    examples = batch()
    mean = model(**examples).loss.item()
    count = int((examples["labels"][:, 1:] != -100).sum())
    assert model.mebp.loss.statistics.tokens == count
    model.mebp.loss.normalizer = 2 * count
    assert model(**examples).loss.item() == pytest.approx(mean / 2, rel=1e-6)
    given = model(**examples, num_items_in_batch=4 * count).loss.item()
    assert given == pytest.approx(mean / 4, rel=1e-6), "what the caller gives comes first"


def test_statistics_count_the_likeliest_tokens(model: Any) -> None:
    examples = batch()
    logits = model(**examples, return_logits=True).logits
    model(**examples)
    targets = examples["labels"][:, 1:]
    right = (logits[:, :-1].argmax(-1) == targets) & (targets != -100)
    assert model.mebp.loss.statistics.correct == int(right.sum())
    assert loss.LossStatistics() == loss.LossStatistics(tokens=0, correct=0)


def test_labels_outside_the_vocabulary(model: Any) -> None:
    for label in (97, -1, -101):
        examples = batch()
        examples["labels"][0, 3] = label
        with pytest.raises(ValueError, match=f"label {label} is not a token"):
            model(**examples)
        assert isinstance(model.get_output_embeddings()(torch.ones(2, 48)), torch.Tensor), (
            "an error leaves it as it was"
        )
    assert model(**batch()).loss.isfinite()


def test_the_weight_that_others_see_has_a_shape_and_computing_with_it_is_an_error(model: Any) -> None:
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = table.weight
        assert weight.shape == (97, 48) and weight.dtype == torch.float32 and weight.device.type == "cpu"
        assert not weight.requires_grad and weight.ndim == 2 and "97" in repr(weight)
        hidden = torch.ones(2, 48)
        for compute in (
            lambda w, h=hidden: h @ w.t(),
            lambda w, h=hidden: torch.nn.functional.linear(h, w),
            lambda w: w.float().sum(),
            lambda w: w * 2,
            lambda w: w.numpy(),
            lambda w: w.tolist(),
        ):
            with pytest.raises((RuntimeError, TypeError), match="head='float'|numpy|tolist"):
                compute(weight)


@pytest.mark.parametrize("weights", ["device", "file"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi"])  # a tied head, a capped one, one with a bias
def test_a_float_head_is_a_plain_layer_with_the_decoded_weight(architecture: str, weights: Any) -> None:
    store = tiny_store(architecture)
    config = mebp.LoraConfig(r=4)
    ours = mebp.load(store, config, weights=weights).train()
    model = mebp.load(store, config, weights=weights, head="float").train()
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear and not head.weight.requires_grad
    for one in (ours, model):
        randomize_adapter(one)
        one(**batch()).loss.backward()
    torch.testing.assert_close(model(**batch()).loss, ours(**batch()).loss, rtol=1e-6, atol=1e-6)
    for (name, found), truth in zip(model.named_parameters(), ours.parameters(), strict=False):
        if found.requires_grad:
            torch.testing.assert_close(found.grad, truth.grad, rtol=1e-4, atol=1e-7, msg=name)
    with torch.no_grad():
        hidden = torch.randn(3, head.in_features)
        torch.testing.assert_close(head(hidden), ours.get_output_embeddings().logits(hidden))


@pytest.mark.parametrize("rows", [16, 97, 4096])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("in_segments", [True, False])
def test_a_head_alone(rows: int, with_bias: bool, in_segments: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits, and the plain layer it can become, some rows at a time."""
    monkeypatch.setattr(head_module, "DECODED_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (97, 48), dtype=torch.uint8, generator=generator)
    weight = Int4Weight.from_codes(codes, torch.randn(2, 97, generator=generator).half(), 32)
    bias = torch.randn(97, generator=generator, dtype=torch.float64) if with_bias else None
    head = head_module.Int4Head(weight, bias, torch.float64)
    if in_segments:

        class Rows:
            def segments(self) -> Any:
                return ((first, weight.rows(first, first + 40)) for first in (0, 40, 80))

        head.rows = Rows()  # type: ignore[assignment]
    x = torch.randn(3, 48, generator=generator, dtype=torch.float64).requires_grad_(True)
    truth = reference.matmul(x, weight, bias)
    dy = torch.randn(3, 97, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(truth, x, dy)
    for layer in (head, head.decoded()):
        y = layer(x)
        torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], expected, rtol=1e-11, atol=1e-11)
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_head_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="head must be int4 or float, got 'bf16'"):
        mebp.load(tiny_store("llama"), head="bf16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "operation",
    [lambda z: 1 + z, lambda z: 1 - z, lambda z: -z, lambda z: z**2, lambda z: abs(z), lambda z: torch.ones(97) + z,
     lambda z: 2 / z, lambda z: z > 0, lambda z: list(z)[1], lambda z: torch.ones(97) * z, lambda z: z @ torch.ones(97),
     lambda z: torch.stack([z, z]), lambda z: torch.where(z > 0, z, 0.0), lambda z: torch.remainder(z, 2.0),
     lambda z: torch.div(z, 2.0, rounding_mode="floor"), lambda z: torch.maximum(z, torch.zeros(97)),
     lambda z: torch.add(z, 2), lambda z: torch.softmax(z, -1), lambda z: torch.tanh(2 + z)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:the model applies")
def test_every_operator_works(model: Any, operation: Any) -> None:
    logits = deferred(model)
    assert torch.allclose(operation(logits), operation(model.get_output_embeddings().logits(logits.hidden)))


def test_output_as_a_tuple(model: Any) -> None:
    named = model(**batch())
    loss, *rest = model(**batch(), return_dict=False)
    assert torch.equal(loss, named.loss) and not any(isinstance(item, DeferredLogits) for item in rest)


def test_hidden_states_are_still_returned(model: Any) -> None:
    out = model(**batch(), output_hidden_states=True)
    assert len(out.hidden_states) == 4 and "logits" not in out


def test_generation_is_not_deferred(model: Any) -> None:
    model(**batch())
    ids = batch(1, 6, None)["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 9)


@pytest.mark.parametrize("count", [0, torch.tensor(0), 12, None])
def test_nothing_to_train_is_a_loss_of_zero(model: Any, count: Any) -> None:
    """A trainer counts 0 items in a batch that is masked as a whole."""
    examples = batch()
    examples["labels"] = torch.full_like(examples["labels"], -100)
    model.train()
    loss = model(**examples, num_items_in_batch=count).loss
    assert loss.item() == 0
    loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert not parameter.grad.any(), "zeros, and no NaN"


def test_num_items_as_a_tensor(model: Any) -> None:
    """As transformers' Trainer hands it over."""
    given = model(**batch(), num_items_in_batch=torch.tensor(37)).loss
    same = model(**batch(), num_items_in_batch=37).loss
    assert torch.equal(given, same) and given.dim() == 0


def test_labels_that_are_shifted_already(model: Any) -> None:
    examples = batch()
    shifted = torch.nn.functional.pad(examples["labels"], (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(**examples, shift_labels=shifted).loss, model(**examples).loss)


def test_without_gradients_logits_are_there_for_whoever_uses_them(model: Any) -> None:
    with torch.no_grad():
        out, real = model(**batch()), model(**batch(), return_logits=True).logits
        as_tuple = model(**batch(), return_dict=False)[1]
    for logits in (out.logits, as_tuple):
        assert isinstance(logits, torch.Tensor) and logits.shape == real.shape and logits.dtype == torch.float32
        assert torch.equal(logits.detach(), real)
        assert torch.equal(logits.argmax(-1), real.argmax(-1)) and torch.equal(torch.stack([logits])[0], real)
        assert (logits.numpy() == real.numpy()).all() and (np.asarray(logits) == real.numpy()).all()
        assert logits.tolist() == real.tolist()
        logits.mul_(2)
        assert torch.equal(logits + 0, 2 * real)


def test_nobody_uses_them(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.get_output_embeddings()), "logits", lambda *_: pytest.fail("logits"))
    with torch.no_grad():
        out = model(**batch())
    assert out.logits.shape == (2, 20, 97) and "OnDemandLogits" in repr(out)


def test_logits_on_demand_are_float32_in_bfloat16_too(store: Any) -> None:
    model = mebp.load(store, dtype=torch.bfloat16)
    with torch.no_grad():
        out, real = model(**batch()), model(**batch(), return_logits=True).logits
    assert out.logits.dtype == torch.float32 and torch.equal(out.logits.detach(), real.float())
    assert out.logits.sum(-1, dtype=torch.float64).dtype == torch.float64, "an option of an operation is kept"
    with torch.no_grad():
        assert mebp.load(store, dtype=torch.float64)(**batch()).logits.dtype == torch.float64
