"""Reports to trackers: what they are told, what is missing, and that one that fails ends no training."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers.integrations

from mebp_triton.training import reporting
from mebp_triton.training.evaluation import Evaluation
from mebp_triton.training.reporting import PACKAGES, Reports, arguments_of, check_reporters
from mebp_triton.training.settings import REPORTERS, TrainConfig
from mebp_triton.training.step import StepResult

SETTINGS = TrainConfig(output_dir="runs/mine", learning_rate=0.5)


def step(number, loss: float | None = 2.0):
    return StepResult(number, loss, 0.25, 100, None, 1e-3, 0.5, [0], False)


def reports(names, directory=Path("mine")):
    return Reports(names, SETTINGS, directory, SimpleNamespace(config=None), total_steps=8, steps_per_epoch=4.0)


@dataclass
class Tracker:
    """Notes what it is told, and fails at some events."""

    fails: str = ""
    told: list[Any] = field(default_factory=list)

    def on_train_begin(self, args, state, control, model):
        self.note("begin", (args.run_name, state.max_steps))

    def on_log(self, args, state, control, model, logs):
        self.note("log", (state.global_step, logs))

    def on_train_end(self, args, state, control, model):
        self.note("end", None)

    def note(self, event, what):
        print(event)
        if event == self.fails:
            raise ConnectionError("no\nnetwork")
        self.told.append((event, what))


@pytest.fixture
def trackers(monkeypatch):
    """Replaces the integrations of transformers by ``Tracker`` for each name."""
    made = {name: Tracker() for name in REPORTERS}
    monkeypatch.setattr(
        transformers.integrations,
        "get_reporting_integration_callbacks",
        lambda names: [lambda name=name: made[name] for name in names],
    )
    return made


def test_trackers_are_told_of_steps_and_evaluations(trackers, capsys):
    with reports(["wandb", "mlflow"]) as made:
        made.on_evaluated(0, Evaluation(1000.0, 0.25, 8, 1))
        made.on_step(step(0))
        made.on_step(step(1, loss=None))
    known = {"learning_rate": 1e-3, "mean_token_accuracy": 0.25, "tokens_per_second": 200.0}
    assert trackers["wandb"].told == [
        ("begin", ("mine", 8)),
        ("log", (0, {"eval_loss": 1000.0, "eval_mean_token_accuracy": 0.25, "epoch": 0.0})),
        ("log", (1, {"loss": 2.0, **known, "epoch": 0.25})),
        ("log", (2, {**known, "epoch": 0.5})),
        ("end", None),
    ]
    assert trackers["mlflow"].told == trackers["wandb"].told and not trackers["trackio"].told
    printed = capsys.readouterr()
    assert printed.out == "" and "begin" in printed.err


def test_a_tracker_that_fails_is_left_out_and_one_that_cannot_start_ends_the_run(trackers):
    trackers["wandb"].fails = "log"
    with reports(["wandb", "mlflow"]) as made:
        with pytest.warns(UserWarning, match="wandb failed, and gets no more reports: no network"):
            made.on_step(step(0))
        made.on_step(step(1))
    assert [event for event, _ in trackers["wandb"].told] == ["begin"]
    assert [event for event, _ in trackers["mlflow"].told] == ["begin", "log", "log", "end"]
    trackers["trackio"].fails = "begin"
    with pytest.raises(ValueError, match=r"report_to trackio cannot start \(no network\): set it up, or leave it out"):
        reports(["mlflow", "trackio"]).__enter__()
    assert trackers["mlflow"].told[-1] == ("end", None)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    assert PACKAGES.keys() == set(REPORTERS)
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda name: name == "tensorboardX" or None)
    check_reporters(["tensorboard"])
    for name in ("wandb", "mlflow", "trackio"):
        with pytest.raises(ValueError, match=f"report_to {name} needs the package {name}: pip install {name}"):
            check_reporters([name])


def test_the_arguments_are_those_that_integrations_read():
    """Of ``TrainingArguments``, each with a default of the same meaning."""
    made = arguments_of(SETTINGS, Path("runs/mine"))
    assert json.loads(made.to_json_string())["learning_rate"] == 0.5 and made.run_name == "mine"
    known = {item.name for item in transformers.TrainingArguments.__dataclass_fields__.values()}
    assert made.to_dict().keys() - known - vars(SETTINGS).keys() <= {
        "logging_dir",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "project",
        "trackio_space_id",
    }


def scalars(directory):
    """The values of all event files by name and step. A record: length, its CRC, the event, the event's CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in directory.rglob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += length + 16
    return found


def test_tensorboards_files_have_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    with reports(["tensorboard"], tmp_path) as made:
        made.on_step(step(0))
        made.on_step(step(1, loss=1.5))
        made.on_evaluated(2, Evaluation(1.25, 0.5, 8, 1))
    found = scalars(tmp_path / "runs")
    assert found["train/loss", 1] == 2.0 and found["train/loss", 2] == 1.5
    assert found["eval/loss", 2] == 1.25 and found["train/learning_rate", 1] == pytest.approx(1e-3)
