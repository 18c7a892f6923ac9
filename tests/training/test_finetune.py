"""A whole run: evaluated before and after, recorded in full, and recorded alike when it was interrupted."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from runs import (
    DEMANDING,
    NUMBERS,
    Crash,
    assert_same_tensors,
    checkpoint_tensors,
    crash_at,
    metrics,
    resumed,
    text_data,
    trainer,
)

from mebp_triton.models.adapter import load_adapter
from mebp_triton.system.errors import Interrupted
from mebp_triton.training import run_directory
from mebp_triton.training.course import row_widths
from mebp_triton.training.evaluation import evaluate
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


def test_where_blocks_are_graphs_the_windows_of_evaluations_have_the_widths_of_rows(
    store, data, held_out, tmp_path, no_plots
):
    made = trainer(store, data, tmp_path / "run", max_steps=1)
    made.config = replace(made.config, block_graphs=True, device="cuda")  # the model stays on the CPU
    widths = set()
    made.model.register_forward_pre_hook(
        lambda model, args, kwargs: widths.add((model.training, kwargs["input_ids"].shape[1])), with_kwargs=True
    )
    finetune(made, held_out)
    step, most = row_widths(made.config)
    assert most > step > 24, "the longest window"
    assert widths == {(True, step), (False, step)}


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


# --- evaluations during the training --------------------------------------------------------------------------------

EVALUATING = DEMANDING | {"validation_file": "held-out.txt", "eval_steps": 3, "save_best": True}
FOUND = ("best_step", "best_eval_loss", "best_adapter", "stopped_early", "steps", "loss_after", "loss_before")


def evaluations(made):
    """The lines of the evaluations, without the time that they took."""
    return [
        {name: value for name, value in row.items() if name != "eval_seconds"} for row in made.run.read_evaluations()
    ]


def best_adapter(made):
    """The files of ``adapter_best/``, by name."""
    return {path.name: path.read_bytes() for path in made.run.best.iterdir()}


def with_template(made):
    """Gives the run a chat template, as ``train --chat-template`` does."""
    made.run.adapter.mkdir(parents=True)
    (made.run.adapter / "chat_template.jinja").write_text("{{ messages }}")
    return made


@pytest.fixture(scope="module")
def evaluated(store, data, held_out, tmp_path_factory):
    """Eight steps with evaluations after three and six; the run, its summary, and what was told of them."""
    made, told = trainer(store, data, tmp_path_factory.mktemp("evaluated") / "run", **EVALUATING), []
    with_template(made)
    summary = finetune(made, held_out, on_evaluated=lambda step, found, best: told.append((step, found.loss, best)))
    return made, summary, told


def test_evaluations_during_the_training_change_no_bit_of_it(evaluated, straight):
    made, summary, _ = evaluated
    assert metrics(made, *NUMBERS) == metrics(straight, *NUMBERS)
    counts = ("blocks_forward", "blocks_recompute")
    assert metrics(made, *counts) == metrics(straight, *counts)
    assert_same_tensors(checkpoint_tensors(made.run.checkpoint), checkpoint_tensors(straight.run.checkpoint))
    assert summary["tokens_per_second"] > 0


def test_the_best_evaluation_is_recorded_and_its_adapter_kept(evaluated, held_out):
    made, summary, told = evaluated
    rows = made.run.read_evaluations()
    assert [row["step"] for row in rows] == [2, 5] and [row["eval_loss"] for row in rows] == [told[1][1], told[2][1]]
    assert [(step, best) for step, _, best in told] == [(0, False), (3, True), (6, True), (8, False)]
    assert summary["loss_before"] == told[0][1] and summary["loss_after"] == told[3][1]
    assert (summary["best_step"], summary["best_eval_loss"], summary["best_adapter"]) == (6, told[2][1], "adapter_best")
    assert summary["stopped_early"] is None
    assert best_adapter(made)["chat_template.jinja"] == b"{{ messages }}"
    load_adapter(made.model, made.run.best)
    assert evaluate(made.model, held_out).loss == summary["best_eval_loss"]
    load_adapter(made.model, made.run.adapter)
    assert evaluate(made.model, held_out).loss == summary["loss_after"]


@pytest.mark.parametrize("crash", [4, 6], ids=["before the next evaluation", "after it"])
def test_a_resumed_run_has_the_evaluations_of_an_uninterrupted_one(
    store, data, held_out, evaluated, tmp_path, no_plots, crash
):
    whole, summary, _ = evaluated
    cut = with_template(trainer(store, data, tmp_path / "run", **EVALUATING))
    with pytest.raises(Crash):
        finetune(cut, held_out, on_step=crash_at(crash))
    if crash == 6:
        assert best_adapter(cut) == best_adapter(whole)
    again = resumed(store, data, tmp_path / "run", **EVALUATING)
    # Whatever was kept after the checkpoint is undone.
    assert again.position.standing.best_step == 3 and best_adapter(again) != best_adapter(whole)
    assert [row["step"] for row in again.run.read_evaluations()] == [2]
    found = finetune(again, held_out)
    assert {name: found[name] for name in FOUND} == {name: summary[name] for name in FOUND}
    assert evaluations(again) == evaluations(whole) and best_adapter(again) == best_adapter(whole)
    assert again.position.standing == whole.position.standing
    # From another's checkpoint as well, in a directory of its own.
    elsewhere = trainer(store, data, tmp_path / "elsewhere", **EVALUATING)
    elsewhere.resume(again.run.checkpoint)
    assert best_adapter(elsewhere) == best_adapter(whole)


def test_an_evaluation_that_was_interrupted_comes_first_when_resumed(
    store, data, held_out, evaluated, tmp_path, no_plots
):
    whole, summary, _ = evaluated
    cut, seen = with_template(trainer(store, data, tmp_path / "run", **EVALUATING)), []

    def on_evaluation(done, total):
        seen.append(cut.step)
        if seen.count(6) == 2:
            raise Interrupted(15)

    assert finetune(cut, held_out, on_evaluation=on_evaluation) is None
    assert (cut.stopped, cut.step) == (15, 6)
    again = resumed(store, data, tmp_path / "run", **EVALUATING)
    assert again.step == 6 and [row["step"] for row in again.run.read_evaluations()] == [2]
    found = finetune(again, held_out)
    assert {name: found[name] for name in FOUND} == {name: summary[name] for name in FOUND}
    assert evaluations(again) == evaluations(whole) and best_adapter(again) == best_adapter(whole)
    assert metrics(again, *NUMBERS) == metrics(whole, *NUMBERS)


def test_the_best_adapter_is_that_of_the_checkpoint(store, data, held_out, tmp_path, no_plots):
    """One kept after the checkpoint goes; one of the last evaluation is in the last checkpoint, resumed or not."""
    settings, run = EVALUATING | {"max_steps": 3, "save_steps": 2}, tmp_path / "run"

    def end(step, found, best):
        if step == 3:
            raise Crash

    with pytest.raises(Crash):
        finetune(trainer(store, data, run, **settings), held_out, on_evaluated=end)
    assert (run / "adapter_best").exists()
    again = resumed(store, data, run, **settings)
    assert again.step == 2 and not (run / "adapter_best").exists()

    def interrupt(done, total):
        if again.step == 3:
            raise Interrupted(15)

    assert finetune(again, held_out, on_evaluation=interrupt) is None
    last = resumed(store, data, run, **settings)
    assert last.finished and finetune(last, held_out)["best_adapter"] == "adapter_best"
    over = resumed(store, data, run, **settings)
    assert over.position.standing == last.position.standing and over.position.standing.best_step == 3
    assert (run / "adapter_best").exists()


def test_a_training_that_does_not_improve_ends_early(store, data, held_out, tmp_path, no_plots):
    """Resumed before its end or not; and with more patience it goes on."""
    patient = EVALUATING | {"eval_steps": 1, "early_stopping_threshold": 9.0, "early_stopping_patience": 5}
    whole = trainer(store, data, tmp_path / "whole", **patient)
    summary = finetune(whole, held_out)
    assert (summary["steps"], summary["stopped_early"], whole.finished) == (6, True, True)
    assert [row["not_improved"] for row in whole.run.read_evaluations()] == [0, 1, 2, 3, 4, 5]
    assert summary["loss_after"] == whole.run.read_evaluations()[-1]["eval_loss"]
    cut = trainer(store, data, tmp_path / "run", **patient)
    with pytest.raises(Crash):
        finetune(cut, held_out, on_step=crash_at(4))
    again = resumed(store, data, tmp_path / "run", **patient)
    assert again.step == 4 and again.position.standing.not_improved == 3
    found = finetune(again, held_out)
    assert {name: found[name] for name in FOUND} == {name: summary[name] for name in FOUND}
    assert_same_tensors(checkpoint_tensors(again.run.checkpoint), checkpoint_tensors(whole.run.checkpoint))
    more = resumed(store, data, tmp_path / "run", **patient | {"early_stopping_patience": 6})
    assert not more.finished and finetune(more, held_out)["steps"] == 7


def test_a_best_evaluation_of_other_data_is_forgotten(store, data, evaluated, tmp_path):
    made, *_ = evaluated
    copy = shutil.copytree(made.run.directory, tmp_path / "run")
    with pytest.warns(UserWarning, match="other data is evaluated than before, so the best evaluation"):
        again = resumed(store, data, copy, **EVALUATING | {"validation_file": "others.txt"})
    standing = again.position.standing
    assert (standing.evaluated_at, standing.best_step, standing.not_improved) == (6, None, 0)


def test_a_best_adapter_that_was_not_kept_is_told(store, data, held_out, tmp_path, no_plots):
    settings = EVALUATING | {"max_steps": 3}
    made = trainer(store, data, tmp_path / "run", **settings | {"save_best": False})
    summary = finetune(made, held_out)
    assert summary["best_step"] == 3 and summary["best_adapter"] is None and not made.run.best.exists()
    with pytest.warns(UserWarning, match="the best evaluation so far, after step 3, was not kept"):
        again = resumed(store, data, tmp_path / "run", **settings)
    # Somebody may move the directory away while the run goes on.
    again.position.standing.kept = True
    again.checkpoint.save(again.position)
    assert not json.loads((again.run.checkpoint / "state.json").read_text())["standing"]["kept"]
    assert finetune(again, held_out)["best_adapter"] is None, "the record names no directory that is not there"
