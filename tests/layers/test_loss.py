"""The one-pass loss under transformers' own forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import batch, decoded_model, our_gradients, randomize_adapter, relative_rms
from torch.utils._python_dispatch import TorchDispatchMode

import mebp_triton as mebp
from mebp_triton.layers import loss
from mebp_triton.layers.deferred_logits import DeferredLogits


@pytest.fixture(scope="module")
def store(shared_store: Any) -> Any:
    return shared_store("llama")


@pytest.fixture(scope="module")
def loaded(store: Any) -> Any:
    model = mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8))
    randomize_adapter(model)
    return model


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    """One model for all tests here, as it was loaded."""
    loaded.zero_grad()
    yield loaded.eval()
    loaded.mebp.loss.normalizer = loaded.mebp.loss.rows = None


def has_real_logits(model: Any) -> bool:
    return isinstance(model.get_output_embeddings()(torch.ones(2, 48)), torch.Tensor)


def test_no_logits_unless_asked_for(model: Any) -> None:
    out = model(**batch())
    assert "logits" not in out and out.logits is None
    assert has_real_logits(model), "only within the model's forward"
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


@pytest.mark.parametrize(
    "chain", [lambda z: z / 4, lambda z: torch.tanh(z / 3.0) * 3.0, lambda z: torch.tanh(torch.tanh(z * 0.2) * 2.0) * 5]
)
def test_the_loss_of_recorded_chains(model: Any, chain: Any) -> None:
    head, labels = model.get_output_embeddings(), torch.randint(0, 97, (2, 5))
    hidden = torch.randn(2, 5, 48, requires_grad=True)
    value = model.mebp.loss(chain(DeferredLogits(hidden, head, (1.0,))), labels)
    (grad,) = torch.autograd.grad(value, hidden)
    real = chain(head.logits(hidden))
    truth = torch.nn.functional.cross_entropy(real[:, :-1].reshape(-1, 97), labels[:, 1:].reshape(-1))
    (truth_grad,) = torch.autograd.grad(truth, hidden)
    assert abs(value.item() - truth.item()) < 1e-5
    assert relative_rms(grad, truth_grad) < 1e-5


def test_a_model_that_does_something_else_gets_the_same_loss(store: Any) -> None:
    def bent(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(*args, **kwargs).last_hidden_state
        return type(out)(loss=self.loss_function(self.lm_head(hidden).abs(), labels, vocab_size=97))

    model, plain = mebp.load(store), decoded_model(store)
    out = model(**batch())
    model.forward = bent.__get__(model)
    with pytest.warns(UserWarning, match="abs"):
        ours = model(**batch()).loss
    assert abs(ours.item() - bent(plain, **batch()).loss.item()) < 1e-5


def test_normalization(model: Any) -> None:
    examples = batch()
    mean = model(**examples).loss.item()
    count = int((examples["labels"][:, 1:] != -100).sum())
    assert model.mebp.loss.statistics.tokens == count
    model.mebp.loss.normalizer = 2 * count
    assert model(**examples).loss.item() == pytest.approx(mean / 2, rel=1e-6)
    given = model(**examples, num_items_in_batch=4 * count).loss.item()
    assert given == pytest.approx(mean / 4, rel=1e-6), "what the caller gives comes first"


def test_the_tokens_of_some_rows_at_a_time_give_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head, given = model.get_output_embeddings(), []
    cross_entropy = head.cross_entropy
    monkeypatch.setattr(head, "cross_entropy", lambda *args: given.append(args[4]) or cross_entropy(*args))
    whole = model(**batch(3)).loss
    model.mebp.loss.rows = 2
    assert model(**batch(3)).loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert given == [None, 2 * 20]


def test_num_items_as_a_tensor(model: Any) -> None:
    """transformers' Trainer passes the number of items in the batch."""
    given = model(**batch(), num_items_in_batch=torch.tensor(37)).loss
    same = model(**batch(), num_items_in_batch=37).loss
    assert torch.equal(given, same) and given.dim() == 0


@pytest.mark.parametrize("count", [0, torch.tensor(0), 12, None])
def test_a_batch_without_a_target_has_loss_and_gradients_zero(model: Any, count: Any) -> None:
    """A trainer counts 0 items in a batch that is masked as a whole."""
    examples = batch()
    examples["labels"] = torch.full_like(examples["labels"], -100)
    value = model.train()(**examples, num_items_in_batch=count).loss
    value.backward()
    assert value.item() == 0
    assert all(grad is not None and not grad.any() for grad in our_gradients(model).values()), "zeros, and no NaN"


def test_real_logits_are_taken_in_float32_and_every_token_is_a_label() -> None:
    one_pass = loss.OnePassLoss()
    assert one_pass.statistics == loss.LossStatistics()
    logits, labels = torch.randn(1, 3, 5).bfloat16(), torch.tensor([[4, 0, -100]])  # one target: token 0
    value = one_pass(logits, labels)
    truth = torch.nn.functional.cross_entropy(logits[0, :1].float(), torch.tensor([0]))
    assert value.dtype == torch.float32 and torch.equal(value, truth)


def test_one_token_has_no_target(model: Any) -> None:
    assert model(input_ids=torch.tensor([[5]]), labels=torch.tensor([[5]])).loss.item() == 0


def test_statistics_count_the_likeliest_tokens(model: Any) -> None:
    examples = batch()
    logits = model(**examples, return_logits=True).logits
    targets = examples["labels"][:, 1:]
    examples["labels"][0, 1:6] = logits[0, :5].argmax(-1)  # so that some are right
    right = (logits[:, :-1].argmax(-1) == targets) & (targets != -100)
    for options in ({"return_logits": True}, {}):
        model.mebp.loss.statistics = loss.LossStatistics()
        model(**examples, **options)
        assert model.mebp.loss.statistics == loss.LossStatistics(int((targets != -100).sum()), int(right.sum()))
    assert int(right.sum()) >= 5 and loss.LossStatistics() == loss.LossStatistics(tokens=0, correct=0)


def test_labels_outside_the_vocabulary(model: Any) -> None:
    for label in (97, -1, -101):
        examples = batch()
        examples["labels"][0, 3] = label
        with pytest.raises(ValueError, match=f"label {label} is not a token of the vocabulary 0..96; .* -100"):
            model(**examples)
        assert has_real_logits(model), "an error leaves the head as it was"
    assert model(**batch()).loss.isfinite()


def test_labels_that_are_shifted_already(model: Any) -> None:
    examples = batch()
    shifted = torch.nn.functional.pad(examples["labels"], (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(**examples, shift_labels=shifted).loss, model(**examples).loss)


def test_output_as_a_tuple(model: Any) -> None:
    named = model(**batch())
    value, *rest = model(**batch(), return_dict=False)
    assert torch.equal(value, named.loss) and not any(isinstance(item, DeferredLogits) for item in rest)


def test_hidden_states_are_still_returned(model: Any) -> None:
    out = model(**batch(), output_hidden_states=True)
    assert len(out.hidden_states) == 4 and "logits" not in out


def test_generation_is_not_deferred(model: Any) -> None:
    model(**batch())
    ids = batch(1, 6, None)["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 9)


def test_without_gradients_logits_are_there_for_whoever_uses_them(model: Any) -> None:
    with torch.no_grad():
        out, real = model(**batch()), model(**batch(), return_logits=True).logits
        as_tuple = model(**batch(), return_dict=False)[1]
    for logits in (out.logits, as_tuple):
        assert "OnDemandLogits" in repr(logits) and logits.shape == real.shape and logits.dtype == torch.float32
        assert torch.equal(logits.detach(), real)


def test_nobody_uses_them(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.get_output_embeddings()), "logits", lambda *_: pytest.fail("logits"))
    with torch.no_grad():
        assert model(**batch()).logits.shape == (2, 20, 97)


class Waits(TorchDispatchMode):
    """Counts what waits for a device: a number that the host asks for, a shape that depends on values."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("divisor", [None, 12, torch.tensor(12)])
def test_a_loss_asks_nothing_of_the_device_until_its_statistics_are_read(model: Any, divisor: Any) -> None:
    """The one wait is the check of labels, which may lie in host memory. The product's own is not seen here."""
    hidden, labels = torch.randn(2, 5, 48), torch.randint(0, 97, (2, 5))
    logits = DeferredLogits(hidden, model.get_output_embeddings(), (1.0,))
    with Waits() as waits:
        model.mebp.loss(logits, labels, num_items_in_batch=divisor)
    assert waits.count == 1
    assert model.mebp.loss.statistics.tokens == 8
