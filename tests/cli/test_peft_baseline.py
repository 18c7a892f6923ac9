"""The baseline: the data, the schedule and the evaluation of ``mebp train``, around transformers and PEFT alone."""

import json
import runpy
import sys

import pytest
import torch
from models import BNB_SIZES, decoded_model, save_tiny_model
from torch import nn

from mebp_triton.cli import peft_baseline
from mebp_triton.huggingface.peft_layer import PeftInt4Linear


@pytest.fixture(scope="module")
def settings(world, tmp_path_factory):
    """The settings of ``world``'s run, for a model with the decoded weights of its store."""
    directory = tmp_path_factory.mktemp("decoded")
    decoded_model(world / "store").save_pretrained(directory)
    return {
        "model": str(directory),
        "tokenizer": str(world / "store"),
        "train_file": str(world / "train.txt"),
        "validation_file": str(world / "held-out.txt"),
        "max_steps": 3,
        "max_length": 24,
        "lora_r": 2,
        "lora_alpha": 32,
        "learning_rate": 0.02,
        "warmup_steps": 0,
        "seed": 42,
    }


def test_it_begins_where_our_run_began_and_learns_as_much(world, settings):
    """Both begin with B = 0, so the first loss is the same; A is drawn in another way, so the later ones are not."""
    ours = json.loads((world / "run" / "run.json").read_text())
    first = json.loads((world / "run" / "metrics.jsonl").read_text().splitlines()[0])
    theirs = peft_baseline.train(settings)
    assert theirs["loss_before"] == pytest.approx(ours["loss_before"], rel=1e-5)
    assert theirs["token_accuracy_before"] == ours["token_accuracy_before"]
    assert theirs["train_losses"][0] == pytest.approx(first["loss"], rel=1e-5)
    gained, wanted = (run["loss_before"] - run["loss_after"] for run in (theirs, ours))
    assert gained == pytest.approx(wanted, rel=0.5)
    assert len(theirs["train_losses"]) == len(theirs["step_seconds"]) == 3 and theirs["tokens_per_second"] > 0
    shared = {"loss_after", "token_accuracy_after", "seconds_per_step_median", "tokens_per_second", "peak_rss_bytes"}
    assert shared <= theirs.keys() & ours.keys()


def test_without_a_validation_file_nothing_is_evaluated(settings):
    result = peft_baseline.train(settings | {"validation_file": None, "max_steps": 1})
    evaluated = [name for name in result if name.startswith(("loss_", "token_accuracy_"))]
    assert len(evaluated) == 4 and {result[name] for name in evaluated} == {None}


def test_four_bits_and_their_replacement(settings, tmp_path):
    save_tiny_model("llama", tmp_path, **BNB_SIZES["llama"])
    for base, replaced in (("nf4-float32", 0), (f"nf4-float32{peft_baseline.REPLACED}", 21)):
        chosen = settings | {"model": str(tmp_path), "base": base}
        model = peft_baseline.with_adapter(peft_baseline.load_base(chosen), chosen)
        assert sum(isinstance(module, PeftInt4Linear) for module in model.modules()) == replaced
        assert sum(parameter.requires_grad for parameter in model.parameters()) == 42


def test_a_base_that_is_none(settings):
    with pytest.raises(ValueError, match=r"base must be one of float32, .*nf4-bfloat16\+mebp, got 'int8'"):
        peft_baseline.load_base(settings | {"base": "int8"})


class Linear4bit(nn.Linear):
    """Named like bitsandbytes' layer, which must not notice an evaluation."""


def test_bitsandbytes_layers_stay_in_training_mode(world):
    model = decoded_model(world / "store")
    model.lm_head = Linear4bit(48, 97, bias=False).eval()
    seen = []
    model.lm_head.register_forward_hook(lambda module, *_: seen.append((module.training, model.training)))
    ids = torch.tensor([[4, 5, 6]])
    peft_baseline.score(model, {"input_ids": ids, "labels": ids})
    assert seen == [(True, False)]


def test_it_answers_with_json(settings, monkeypatch, capsys):
    """As the demo and the benchmarks start it: settings as JSON, numbers as JSON, nothing else on standard output."""
    given = settings | {"validation_file": None, "max_steps": 1}
    monkeypatch.setattr(sys, "argv", ["peft_baseline", json.dumps(given)])
    capsys.readouterr()
    runpy.run_path(peft_baseline.__file__, run_name="__main__")
    assert len(json.loads(capsys.readouterr().out)["train_losses"]) == 1
