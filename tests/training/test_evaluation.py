"""Evaluation: means over tokens, not over windows; the model as transformers computes it; its mode put back."""

import math

import numpy as np
import pytest
import torch
from models import decoded_model
from runs import run_store, text_data, word_tokenizer

import mebp_triton
from mebp_triton.data.loading import load_data
from mebp_triton.data.tokenized import DataReport, TokenizedData
from mebp_triton.system.errors import RunError
from mebp_triton.training.evaluation import Evaluation, evaluate, int4_score, plain_score


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return run_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def model(store):
    return mebp_triton.load(store, mebp_triton.LoraConfig(r=2, lora_dropout=0.5))


def by_hand(store, data, places):
    """Sum of losses, number of tokens, and of those predicted, from transformers' own logits in float64."""
    reference = decoded_model(store, torch.float64)
    loss, correct, tokens = 0.0, 0, 0
    for place in places:
        example = data[place]
        logits = reference(input_ids=example.input_ids[None]).logits[0, :-1]
        targets = example.labels[1:]
        valid = targets != -100
        loss += float(torch.nn.functional.cross_entropy(logits[valid], targets[valid], reduction="sum"))
        correct += int((logits[valid].argmax(-1) == targets[valid]).sum())
        tokens += int(valid.sum())
    return loss, correct, tokens


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Prompts and completions of many lengths: a mean over windows would be another number."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [f'{{"prompt": "the cat", "completion": "{" sees nothing" * (1 + 3 * (i % 4))}"}}\n' for i in range(9)]
    path.write_text("".join(rows))
    return load_data(path, word_tokenizer(), 32)


@pytest.mark.parametrize("windows", [None, 1, 3, 100])
def test_it_is_the_mean_over_tokens(store, model, ragged, windows):
    places = range(9) if windows in (None, 100) else [i * 9 // windows for i in range(windows)]
    loss, correct, tokens = by_hand(store, ragged, places)
    result = evaluate(model, ragged, windows)
    assert result.loss == pytest.approx(loss / tokens, rel=1e-5)
    assert result.token_accuracy == correct / tokens
    assert (result.tokens, result.windows) == (tokens, len(places))
    assert result.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    if windows is None:
        each = [evaluate(model, one(ragged, place)).loss for place in places]
        assert abs(np.mean(each) - result.loss) > 1e-3, "the rows do not tell the two means apart"


def test_any_transformers_model_is_scored_by_its_logits(store, model, ragged):
    plain = decoded_model(store).train()
    result = evaluate(plain, ragged, 4, score=plain_score)
    assert plain.training
    ours = evaluate(model, ragged, 4)
    assert result.loss == pytest.approx(ours.loss, rel=1e-5)
    assert (result.token_accuracy, result.tokens, result.windows) == (ours.token_accuracy, ours.tokens, ours.windows)


def test_windows_that_are_padded_to_few_widths(model, ragged):
    seen = set()

    def score(model, batch):
        seen.add(batch["input_ids"].shape[1])
        return int4_score(model, batch)

    result = evaluate(model, ragged, score=score, widths=(16, 64))
    plain = evaluate(model, ragged)
    assert all(width % 16 == 0 for width in seen)
    assert result.loss == pytest.approx(plain.loss, rel=1e-5)
    assert (result.token_accuracy, result.tokens) == (plain.token_accuracy, plain.tokens)


def one(data, place):
    row = slice(data.offsets[place], data.offsets[place + 1])
    return TokenizedData(data.ids[row], data.trained[row], np.array([0, row.stop - row.start]), data.report)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_put_back(model, ragged, training):
    model.train(training)
    state = torch.get_rng_state()
    assert evaluate(model, ragged) == evaluate(model, ragged)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training and model.model.layers[0].training is training

    def fail(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate(model, ragged, progress=fail)
    assert model.training is training
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_progress(model, ragged):
    seen = []
    evaluate(model, ragged, 4, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_nothing_to_predict_and_no_windows(model, ragged):
    blank = TokenizedData(ragged.ids, np.zeros_like(ragged.trained), ragged.offsets, DataReport(9, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(model, blank)
    with pytest.raises(ValueError, match="number of windows must be at least 1, got 0"):
        evaluate(model, ragged, 0)


def test_a_window_of_masked_labels_counts_nothing(store, model, ragged):
    trained = ragged.trained.copy()
    trained[: ragged.offsets[4]] = False
    loss, _, tokens = by_hand(store, ragged, range(4, 9))
    result = evaluate(model, TokenizedData(ragged.ids, trained, ragged.offsets, ragged.report))
    assert result.tokens == tokens and result.loss == pytest.approx(loss / tokens, rel=1e-5)


def test_a_loss_that_is_not_finite_is_a_failed_run(store, tmp_path):
    model = mebp_triton.load(store, mebp_triton.LoraConfig(r=2))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(RunError, match="the evaluation loss is nan"):
        evaluate(model, text_data(tmp_path))


def test_perplexity_of_a_hopeless_model_is_none():
    assert Evaluation(1000.0, 0.0, 1, 1).perplexity is None
    assert Evaluation(2.0, 0.0, 1, 1).perplexity == pytest.approx(math.exp(2))


def test_a_token_that_the_model_does_not_have(store, model):
    ids = np.array([5, 6, 1000, 7], np.int32)
    data = TokenizedData(ids, np.ones(4, bool), np.array([0, 4]), DataReport(1, 4, 3, 0, 0))
    assert data.highest_id() == 1000
    with pytest.raises(ValueError, match="the evaluation data has the token id 1000, and the model 97 tokens"):
        evaluate(model, data)
