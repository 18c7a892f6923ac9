"""A whole run: evaluated before and after, recorded in full, and recorded alike when it was interrupted."""

import json
import math

import numpy as np
import pytest
from runs import DEMANDING, Crash, crash_at, metrics, resumed, text_data, trainer

from mebp_triton.training import run_directory
from mebp_triton.training.finetune import finetune

PROMISED = {
    "loss_before",
    "loss_after",
    "token_accuracy_before",
    "token_accuracy_after",
    "steps",
    "tokens_per_second",
    "seconds_per_step_median",
    "peak_rss_bytes",
    "peak_rss_anonymous_bytes",
    "peak_device_bytes",
    "planned_peak_bytes",
    "selected_ratio",
    "selection_mode",
    "backend",
}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return text_data(tmp_path_factory.mktemp("held-out"), count=10, seed=9)


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take most of the time of so short a run."""
    monkeypatch.setattr(run_directory, "draw_plots", lambda *_: [])


def test_a_whole_run(store, data, held_out, tmp_path):
    made = trainer(
        store, data, tmp_path / "run", max_steps=12, selection_mode="identity", selected_ratio=0.67, learning_rate=1e-2
    )
    seen = []
    summary = finetune(made, held_out, on_evaluation=lambda done, total: seen.append((done, total)))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record.keys() >= PROMISED
    assert {key: record[key] for key in summary} == summary
    assert record["loss_after"] < record["loss_before"]
    assert 0 <= record["token_accuracy_before"] < record["token_accuracy_after"] <= 1
    assert record["perplexity_after"] == pytest.approx(math.exp(record["loss_after"]))
    assert (record["steps"], record["selected_ratio"], record["selection_mode"]) == (12, 0.67, "identity")
    assert record["backend"] == "panel"  # what ran, not what was asked for
    assert record["peak_device_bytes"] is None
    assert record["peak_rss_bytes"] >= record["peak_rss_anonymous_bytes"] > 1 << 20
    rows = made.run.read_metrics()
    assert record["seconds_per_step_median"] == pytest.approx(float(np.median([row["seconds"] for row in rows])))
    spent = sum(row["tokens"] for row in rows) / record["tokens_per_second"]
    assert spent >= sum(row["seconds"] for row in rows)
    assert record["settings"]["selected_ratio"] == 0.67 and record["settings"]["weights"] == "file"
    assert record["data"]["rows"] == len(data)
    assert {"torch", "python", "mebp-triton", "transformers"} <= record["environment"]["versions"].keys()
    windows = len(held_out)
    assert seen == [(i + 1, windows) for i in range(windows)] * 2
    for name in ("loss.png", "memory.png", "time_per_block.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n"), name
    assert record["plots"] == ["loss.png", "memory.png", "time_per_block.png"]


def test_without_a_validation_file_the_evaluations_are_null(store, data, tmp_path, no_plots):
    summary = finetune(trainer(store, data, tmp_path / "run", max_steps=1), None)
    evaluated = [summary[f"{what}_{when}"] for what in ("loss", "token_accuracy") for when in ("before", "after")]
    assert evaluated == [None] * 4
    assert summary["selected_ratio"] == 1.0
    assert summary["train_loss_last"] > 0


def test_evaluating_changes_no_step_and_outlasts_an_interruption(store, data, straight, held_out, tmp_path, no_plots):
    made = trainer(store, data, tmp_path / "whole", **DEMANDING)
    whole = finetune(made, held_out)
    assert metrics(made, "loss") == metrics(straight, "loss")
    cut = trainer(store, data, tmp_path / "cut", **DEMANDING)
    with pytest.raises(Crash):
        finetune(cut, held_out, on_step=crash_at(5))
    summary = finetune(resumed(store, data, tmp_path / "cut", **DEMANDING), held_out)
    for key in ("loss_before", "loss_after", "token_accuracy_before", "token_accuracy_after", "steps"):
        assert summary[key] == whole[key], key
    assert summary["resumed_at_step"] == 4 and whole["resumed_at_step"] is None
