"""The loss of a source is the one that transformers computes from its whole logits."""

import pytest
import torch
from models import save_tiny_model
from source_runs import opened_source, random_rows, source_run, whole_model
from torch import nn

from mebp_triton.convert.calibration import source_loss
from mebp_triton.convert.calibration.source_loss import FloatHead, SourceLoss
from mebp_triton.convert.calibration.source_run import SourceRun
from mebp_triton.convert.readers.merged_store import MergedStore
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.training.evaluation import evaluate, plain_score

DATA = random_rows()


def loss_of(run, data=DATA):
    return evaluate(run.model, data, score=SourceLoss(run))


# Tied and untied heads, a head with a bias, soft-capping, and logits that are scaled.
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi", "gemma3_text", "granite"])
def test_it_is_that_of_transformers(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(source_loss, "PIECE_ELEMENTS", 1000)  # several pieces, the last of them a partial one
    ours = loss_of(source_run(tmp_path, architecture))
    truth = evaluate(whole_model(tmp_path), DATA, score=plain_score)
    assert ours.loss == pytest.approx(truth.loss, rel=2e-6)
    assert (ours.token_accuracy, ours.tokens, ours.windows) == (truth.token_accuracy, truth.tokens, truth.windows)


def test_as_many_positions_as_tokens(tmp_path):
    """The table of positions is no table of tokens, though it is as high."""
    run = source_run(tmp_path, "gpt2", n_positions=97)
    assert run.model.config.n_positions == run.model.config.vocab_size
    assert loss_of(run).loss == pytest.approx(evaluate(whole_model(tmp_path), DATA, score=plain_score).loss, rel=2e-6)


def test_some_windows_alone(tmp_path):
    source = opened_source(save_tiny_model("llama", tmp_path / "model"))
    run = SourceRun(source, DATA, 2, tmp_path)
    ours = evaluate(run.model, DATA, 2, score=SourceLoss(run))
    assert ours.loss == pytest.approx(evaluate(whole_model(tmp_path), DATA, 2, score=plain_score).loss, rel=2e-6)


def test_codes_of_a_source_are_its_weights(shared_store):
    """Matrices that the source has as codes are decoded, and the head stays one of codes."""
    from models import decoded_model

    store = shared_store("gemma3_text")
    source = MergedStore(store)
    source.bind(build_skeleton(source.config, torch.float32))
    ours = loss_of(SourceRun(source, DATA, None, store.parent))
    assert ours.loss == pytest.approx(evaluate(decoded_model(store), DATA, score=plain_score).loss, rel=2e-6)


def test_progress_counts_blocks(tmp_path):
    seen = []
    SourceLoss(source_run(tmp_path, "llama"), lambda *state: seen.append(state))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_float_head_in_pieces_is_the_whole_head(monkeypatch):
    monkeypatch.setattr(source_loss, "PIECE_ELEMENTS", 256)
    weight, bias, x = torch.randn(50, 32).half(), torch.randn(50), torch.randn(2, 5, 32)
    head, whole = FloatHead(weight, bias), nn.functional.linear(x, weight.float(), bias)
    torch.testing.assert_close(head.logits(x), whole)
    targets = torch.randint(50, (10,))
    targets[3] = -100
    losses, best = head.cross_entropy(x.view(10, 32), targets, -100, (0.5, 2.0))
    capped = torch.tanh(whole.view(10, 50) * 0.5) * 2.0
    torch.testing.assert_close(losses, nn.functional.cross_entropy(capped, targets, reduction="none"))
    assert torch.equal(best, capped.argmax(-1))
