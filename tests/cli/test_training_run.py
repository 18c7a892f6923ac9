"""A training run through the command: its plan, the store beside it, resuming, and signals that end it early."""

import json
import re
import shutil
import signal

import pytest
from commands import (
    QUICK,
    adapter_bytes,
    answer,
    assert_one_line,
    assert_refused,
    before_step,
    killed_before_step,
    metrics,
    put,
    record,
    tell,
    tell_at_call,
    texts,
    told_twice,
    train,
    tree,
)
from ranks import run_ranks

from mebp_triton.cli import training_run
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic, temporaries
from mebp_triton.training import evaluation

# --- memory ---------------------------------------------------------------------------------------------------------


def test_a_budget_chooses_and_is_kept(mebp, world, tmp_path):
    code, _, err = mebp(*train(world, tmp_path, "--memory-budget=4GiB"))
    found = record(tmp_path / "run")
    assert code == 0 and "planned peak " in err and "weights device" in err
    assert found["settings"]["weights"] == "device" and found["settings"]["memory_budget"] == "4GiB"
    assert 0 < found["planned_peak_bytes"] < 4 << 30


def test_a_budget_that_is_too_small_writes_nothing(mebp, world, tmp_path):
    settled = ["--weights=file", "--checkpoints=file", "--optimizer-state=file", "--recompute-granularity=full"]
    command = train(world, tmp_path, "--memory-budget=10MiB", *settled, "--mlp-chunk-tokens=0", store=world / "model")
    assert_refused(mebp, command, ["--memory-budget 10MiB is too small: the smallest plan needs"], tmp_path)


def test_a_model_that_cannot_be_planned_for_is_trained(mebp, world, tmp_path, monkeypatch):
    def failing(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr("mebp_triton.training.plan.traced_model.TracedModel.run", failing)
    code, _, err = mebp(*train(world, tmp_path))
    assert code == 0 and "no peak is predicted: a model of type llama cannot be traced: RuntimeError: no" in err
    assert record(tmp_path / "run")["planned_peak_bytes"] is None
    code, _, err = mebp(*train(world, tmp_path, "--memory-budget=4GiB", output="other"))
    assert code == 2 and "cannot be traced" in err and not (tmp_path / "other").exists()


# --- a model that is quantized first --------------------------------------------------------------------------------


def test_a_model_is_quantized_first_into_a_store_beside_the_run(mebp, world, tmp_path):
    command = ["train", world / "model", *texts(world), f"--output-dir={tmp_path / 'run'}", *QUICK, "--json"]
    code, out, err = mebp(*command)
    assert code == 0 and "is not a store: quantizing it into" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-store"]
    assert json.loads(out)["steps"] == 3 and len(Store(tmp_path / "run-store").matrices) == 22
    shutil.rmtree(tmp_path / "run")
    # The store may be another model's.
    assert_one_line(mebp(*command), "run-store is there from an earlier run: --resume takes it")
    code, again, err = mebp(*command, "--resume")
    assert code == 0 and "was quantized before: using" in err
    assert json.loads(again)["loss_after"] == json.loads(out)["loss_after"]
    code, _, err = mebp(*command, "--validation-file", str(world / "train.txt"), "--resume")
    assert code == 2 and "has ended, evaluated with --validation-file" in err and err.endswith("use `mebp eval`\n")
    code, ended, err = mebp(*command, "--resume")
    assert code == 0 and "nothing is left to do" in err and json.loads(ended) == json.loads(again)


@pytest.mark.parametrize(
    ("source", "flags"), [("wide/model", []), ("model", ["--scheme=symmetric"]), ("model", ["--embedding-bits=4"])]
)
def test_a_store_beside_the_run_that_is_another_models_is_not_used(mebp, world, tmp_path, source, flags):
    """Both models' directories are called ``model``."""
    shutil.copytree(world / "store", tmp_path / "run-store")
    (tmp_path / "run").mkdir()
    before = tree(tmp_path)
    code, _, err = mebp(*train(world, tmp_path, *flags, "--resume", store=world / source))
    assert code == 2 and f"run-store is a store of safetensors directory model ({world / 'model'}), and" in err
    assert tree(tmp_path) == before
    way = re.search("give (.*) in place of the model to go on", err)[1]
    assert mebp(*train(world, tmp_path, "--resume", store=way))[0] == 0


# --- resuming -------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_as_if_nothing_had_happened(mebp, world, tmp_path):
    """One process ends after three of four steps, with a checkpoint after two; the run equals one that never stopped.

    With chunks that are not named again: they change the order of sums, so the run keeps them.
    """
    command = ["train", str(world / "store"), *texts(world), *QUICK, "--json", "--lora-dropout=0.1", "--max-steps=4"]
    chunks = "--mlp-chunk-tokens=12"
    whole = answer(mebp(*command, chunks, f"--output-dir={tmp_path / 'whole'}"))
    arguments = [*command, f"--output-dir={tmp_path / 'cut'}", "--save-steps=2"]
    (ended,) = run_ranks(killed_before_step, tmp_path / "log", 3, [*arguments, chunks], size=1)
    assert ended.code == 9, ended.err
    assert not (tmp_path / "cut" / "run.json").exists()
    code, out, err = mebp(*arguments, "--resume")
    assert code == 0 and "resuming at step 2 of 4" in err
    resumed = json.loads(out)
    assert resumed["resumed_at_step"] == 2
    for key in ("loss_before", "loss_after", "train_loss_last", "steps"):
        assert resumed[key] == whole[key], key
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")
    # At its end nothing is left to do, and what it found stays.
    before = (tmp_path / "cut" / "run.json").read_bytes()
    code, out, err = mebp(*arguments, "--resume")
    assert code == 0 and "nothing is left to do" in err and json.loads(out) == resumed
    assert (tmp_path / "cut" / "run.json").read_bytes() == before
    # From a checkpoint elsewhere, into a new directory.
    from_there = f"--resume-from-checkpoint={tmp_path / 'cut' / 'checkpoint'}"
    assert answer(mebp(*command, f"--output-dir={tmp_path / 'new'}", from_there))["loss_after"] == whole["loss_after"]
    code, _, err = mebp(*command, f"--output-dir={tmp_path / 'other'}", from_there, "--mlp-chunk-tokens=8")
    assert code == 2 and "--mlp-chunk-tokens was 12 and now is 8" in err


def test_a_run_killed_before_its_first_checkpoint_starts_again(mebp, world, tmp_path):
    command = [str(part) for part in train(world, tmp_path)]
    (ended,) = run_ranks(killed_before_step, tmp_path / "log", 1, command, size=1)
    assert ended.code == 9 and (tmp_path / "run" / "metrics.jsonl").exists(), ended.err
    code, _, err = mebp(*command, "--resume")
    assert code == 0 and "has no checkpoint yet: starting from the beginning" in err
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize("left", [[], ["evaluation_before.json"]])
def test_a_run_that_ended_before_its_first_step_starts_again(mebp, world, tmp_path, left):
    (tmp_path / "run").mkdir()
    for name in left:
        shutil.copy(world / "run" / name, tmp_path / "run")
    code, _, err = mebp(*train(world, tmp_path, f"--validation-file={world / 'held-out.txt'}", "--resume"))
    assert code == 0 and "has no checkpoint yet: starting from the beginning" in err
    assert len(metrics(tmp_path / "run")) == 3


def test_a_directory_that_is_no_run_is_not_started_in(mebp, world, tmp_path):
    (tmp_path / "run").mkdir()
    put(tmp_path / "run", "thesis.txt", "mine")
    parts = ["there is no checkpoint in", "to resume from"]
    assert_refused(mebp, train(world, tmp_path, "--resume"), parts, tmp_path)


def test_resuming_a_finished_run_touches_no_file(mebp, world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    before = tree(tmp_path)
    value = answer(mebp(*train(world, tmp_path, f"--validation-file={world / 'held-out.txt'}", "--resume", "--json")))
    assert value["steps"] == 3 and tree(tmp_path) == before


def test_a_run_directory_in_use_is_refused(mebp, world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "new").mkdir()
    with atomic.locked(tmp_path / "run"), atomic.locked(tmp_path / "new"):
        line = "run is in use by another process: wait for its end, or choose another place"
        assert_refused(mebp, train(world, tmp_path, "--resume"), [line], tmp_path)
        assert_refused(mebp, train(world, tmp_path, output="new"), ["new is in use by another process"], tmp_path)


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_told_to_stop_finishes_its_step_and_goes_on_from_there(
    mebp, world, tmp_path, monkeypatch, number, code
):
    command = train(world, tmp_path, f"--validation-file={world / 'held-out.txt'}", "--json")
    with monkeypatch.context() as patch:
        before_step(patch, 1, lambda: tell(number))
        found, out, err = mebp(*command)
    assert (found, out) == (code, "")
    assert err.splitlines()[-1] == "mebp: interrupted after step 2 of 3; --resume goes on from there"
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoint", "adapter", "metrics.jsonl", "evaluation_before.json"}
    value, whole = answer(mebp(*command, "--resume")), record(world / "run")
    assert value["resumed_at_step"] == 2
    for key in ("loss_before", "loss_after", "train_loss_last", "token_accuracy_after", "steps"):
        assert value[key] == whole[key], key
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(world / "run")


def test_a_training_told_twice_ends_at_once(mebp, world, tmp_path):
    """In the third step, with a checkpoint after the second; and again while that of the third is written."""
    command = [str(part) for part in train(world, tmp_path, "--save-steps=2")]
    (ended,) = run_ranks(told_twice, tmp_path / "log", command, size=1)
    assert ended.code == 143 and ended.err.endswith("mebp: stopped at once\n") and "Traceback" not in ended.err
    assert json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())["step"] == 2
    assert answer(mebp(*command, "--resume", "--json"))["resumed_at_step"] == 2
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(temporaries.TEMPORARY_PREFIX)]


@pytest.mark.parametrize("place", ["loading", "evaluating before", "evaluating after"])
def test_a_training_interrupted_outside_of_its_steps(mebp, world, tmp_path, monkeypatch, place):
    command = train(world, tmp_path, f"--validation-file={world / 'held-out.txt'}")
    owner, name, at = {
        "loading": (training_run, "load", 1),
        "evaluating before": (evaluation, "collate", 1),
        "evaluating after": (evaluation, "collate", 7),
    }[place]
    with monkeypatch.context() as patch:
        tell_at_call(patch, owner, name, signal.SIGTERM, at)
        code, out, err = mebp(*command)
    assert (code, out) == (143, "")
    assert err.splitlines()[-1] == "mebp: interrupted; --resume goes on from the last checkpoint"
    if place == "evaluating after":
        assert answer(mebp(*command, "--resume", "--json"))["steps"] == 3
    else:
        assert not (tmp_path / "run").exists()


# --- evaluations during the training --------------------------------------------------------------------------------


def test_evaluations_end_a_training_early_and_name_the_best(mebp, world, tmp_path):
    flags = ["--eval-steps=1", "--save-best", "--early-stopping-patience=1", "--early-stopping-threshold=9", "--json"]
    command = train(world, tmp_path, f"--validation-file={world / 'held-out.txt'}", *flags)
    code, out, err = mebp(*command)
    value, lines = json.loads(out), " ".join(err.split())
    assert code == 0 and (value["steps"], value["stopped_early"], value["best_step"]) == (2, True, 2)
    assert "after step 1: evaluation loss" in lines and ", the best so far" in lines
    assert "stopped early, after step 2 of 3: an evaluation did not improve" in lines
    assert f"the best evaluation was after step 2, with loss {value['best_eval_loss']:.4f}: its adapter is" in lines
    evaluate = ["eval", world / "store", f"--validation-file={world / 'held-out.txt'}", "--max-length=24", "--json"]
    best = answer(mebp(*evaluate, f"--adapter={tmp_path / 'run' / 'adapter_best'}"))
    assert best["loss"] == value["best_eval_loss"]
    before = tree(tmp_path)
    code, out, err = mebp(*command, "--resume")
    assert code == 0 and json.loads(out) == value and tree(tmp_path) == before
    assert "nothing is left to do, since the run stopped early; --early-stopping-patience left out or higher" in err
    value = answer(mebp(*command, "--resume", "--early-stopping-patience=2"))
    assert (value["steps"], value["stopped_early"], value["resumed_at_step"]) == (3, None, 2)
    assert value["loss_after"] == record(world / "run")["loss_after"]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(world / "run")


def test_a_tracker_is_told_and_changes_no_bit(mebp, world, tmp_path):
    pytest.importorskip("tensorboardX")
    command = train(world, tmp_path, f"--validation-file={world / 'held-out.txt'}", "--report-to=tensorboard", "--json")
    answer(mebp(*command))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(world / "run")
    (events,) = (tmp_path / "run" / "runs").rglob("events.*")
    for name in (b"train/loss", b"train/grad_norm", b"eval/loss"):
        assert name in events.read_bytes(), name


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_read(mebp, world, tmp_path, monkeypatch):
    monkeypatch.setattr("mebp_triton.training.reporting.PACKAGES", {"wandb": ("no_such_package",)})
    parts = ["--report-to wandb needs the package no_such_package: pip install no_such_package"]
    assert_refused(mebp, train(world, tmp_path, "--report-to=wandb"), parts, tmp_path)
