"""The run directory: strict JSON in it, lines that a crash cut short, plots where they can be drawn."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mebp_triton.data.tokenized import DataReport
from mebp_triton.system import atomic, errors, strict_json, temporaries
from mebp_triton.system.memory import MemoryWatch
from mebp_triton.training.evaluation import Evaluation
from mebp_triton.training.run_directory import OthersRunDirectory, RunDirectory, run_settings_beside
from mebp_triton.training.run_settings import resolve
from mebp_triton.training.settings import TrainConfig

PNG = b"\x89PNG\r\n\x1a\n"


def rows(count):
    return [{"step": step, "loss": 3.0 - step / 10} for step in range(count)]


@pytest.fixture
def run(tmp_path):
    made = RunDirectory(tmp_path / "deep" / "run")
    made.create()
    return made


def watched():
    """A step over three blocks, forwards and backwards."""
    watch = MemoryWatch(torch.device("cpu"))
    events = [("forward", 0), ("forward", 1), ("forward", 2), ("backward", 2), ("backward", 0)]
    watch.timeline = [(10.0 + i / 8, event, block, 1 << 24, 1 << 22, 0) for i, (event, block) in enumerate(events)]
    return watch


def test_another_process_reads_the_run_and_writes_nothing(run):
    run.append_metrics(rows(1)[0])
    run.save_evaluation(Evaluation(1.5, 0.25, 8, 1), {"of": 1})
    before = {path: path.read_bytes() for path in run.directory.rglob("*")}
    other = OthersRunDirectory(run.directory)
    other.create()
    other.append_metrics(rows(2)[1])
    other.cut_metrics(0)
    other.save_evaluation(Evaluation(0.5, 0.25, 8, 1), {"of": 1})
    other.finish({}, TrainConfig(), DataReport(1, 8, 7, 0, 0), watched())
    with other.writing(), other.writing():
        pass
    assert {path: path.read_bytes() for path in run.directory.rglob("*")} == before
    assert other.read_metrics() == rows(1) and other.saved_evaluation({"of": 1}).loss == 1.5
    absent = OthersRunDirectory(run.directory / "absent")
    absent.create()
    assert not absent.directory.exists()


# --- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_are_appended_and_read(run):
    assert run.read_metrics() == []
    for row in rows(4):
        run.append_metrics(row)
    assert run.read_metrics() == rows(4)
    with pytest.raises(ValueError):
        run.append_metrics({"step": 4, "loss": float("nan")})
    assert run.read_metrics() == rows(4)


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', '{"step": 4, "loss": 1}', "\n"])
def test_cutting_drops_later_steps_and_a_torn_line(run, tail):
    for row in rows(4):
        run.append_metrics(row)
    with open(run.metrics, "a") as file:
        file.write(tail)
    run.cut_metrics(3)
    assert run.read_metrics() == rows(3)
    assert run.metrics.read_text().endswith("}\n")
    run.append_metrics({"step": 3, "loss": 1.0})
    assert len(run.read_metrics()) == 4
    run.cut_metrics(0)
    assert run.read_metrics() == [] and run.metrics.read_text() == ""


@pytest.mark.parametrize("line", ["garbage", '{"step": 1, "step": 2}', '{"loss": 1}', "[]", '{"step": true}', "\xff"])
def test_a_damaged_line_is_named_and_no_line_is_lost(run, line):
    for row in rows(2):
        run.append_metrics(row)
    with open(run.metrics, "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    run.append_metrics(rows(3)[2])
    before = run.metrics.read_bytes()
    for use in (lambda: run.cut_metrics(3), run.read_metrics):
        with pytest.raises(errors.FileError, match=r"line 3 of .*metrics\.jsonl"):
            use()
    assert run.metrics.read_bytes() == before
    run.cut_metrics(2)  # what a step that is done again has left is no matter
    assert run.read_metrics() == rows(2)


def test_an_evaluation_that_is_gone_or_was_changed_is_told(run):
    run.save_evaluation(Evaluation(1.5, 0.25, 8, 1), {"validation_file": "v.txt"})
    run.evaluation.write_text(run.evaluation.read_text().replace("1.5", "1.25"))
    with pytest.raises(errors.FileError, match="damaged or was changed"):
        run.saved_evaluation({"validation_file": "v.txt"})
    run.evaluation.unlink()
    with pytest.warns(UserWarning, match="evaluation_before.json is gone"):
        assert run.saved_evaluation({"validation_file": "v.txt"}) is None
    assert run.saved_evaluation({"validation_file": None}) is None


def test_a_run_whose_plots_fail_is_whole(run, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mebp_triton.training.run_directory.draw_plots", fail)
    with pytest.warns(UserWarning, match="the plots are not drawn: .*No space left"):
        run.finish({"steps": 1}, TrainConfig(), DataReport(1, 8, 7, 0, 0), watched())
    assert run.summary({"max_length": TrainConfig().max_length})["steps"] == 1
    with pytest.raises(ValueError, match=r"has ended, evaluated with max_length \d+: for 7, use `mebp eval`"):
        run.summary({"max_length": 7})
    run.record.write_text(run.record.read_text().replace('"steps": 1', '"steps": 2'))
    with pytest.raises(errors.FileError, match="damaged or was changed"):
        run.summary({})


def test_free_memory_goes_back_before_plots_are_drawn(run, monkeypatch):
    """Else what the drawing library takes would be the peak of a small run."""
    done = []
    monkeypatch.setattr("mebp_triton.training.run_directory.return_free_memory", lambda: done.append("returned"))
    monkeypatch.setattr("mebp_triton.training.run_directory.draw_plots", lambda *_: done.append("drawn") or [])
    run.finish({"steps": 1}, TrainConfig(), DataReport(1, 8, 7, 0, 0), watched())
    assert done == ["returned", "drawn"]


def test_lines_of_evaluations_are_read_and_cut_apart(run):
    for row in rows(4):
        run.append_metrics(row)
        run.append_metrics({"step": row["step"], "eval_loss": 2.0})
    assert run.read_metrics() == rows(4) and [row["step"] for row in run.read_evaluations()] == [0, 1, 2, 3]
    assert run.cut_metrics(3, evaluated_at=2) == [0, 1, 2]
    assert run.read_metrics() == rows(3) and [row["step"] for row in run.read_evaluations()] == [0, 1]
    assert run.cut_metrics(0) == [] and run.read_evaluations() == []


def test_cutting_nothing(run):
    run.cut_metrics(3)
    assert not run.metrics.exists()
    run.sync_metrics()
    run.append_metrics({"step": 2})
    before = run.metrics.stat()
    run.cut_metrics(3)
    after = run.metrics.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "it was written again"


def test_metrics_are_synced(run, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "sync_file", synced.append)
    run.append_metrics({"step": 0})
    run.sync_metrics()
    assert synced == [run.metrics]


# --- the directory --------------------------------------------------------------------------------------------------


def test_a_used_directory_is_refused_unless_resumed(run):
    RunDirectory(run.directory)  # still empty
    run.append_metrics({"step": 0})
    with pytest.raises(errors.FileError, match="exists already"):
        RunDirectory(run.directory)
    assert RunDirectory(str(run.directory), resume=True).read_metrics() == [{"step": 0}]


def test_making_one_writes_nothing_until_created(tmp_path):
    made = RunDirectory(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    made.create()
    made.create()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    made = RunDirectory(tmp_path / "run")
    made.adapter.mkdir(parents=True)
    name = temporaries.temporary_prefix().rsplit("-", 2)[0] + f"-{1 << 30}.7-x"
    for place in (made.directory, made.adapter):
        (place / name).touch()
        (place / "mine").touch()
    with made.writing():
        assert sorted(path.name for path in made.directory.rglob("*")) == ["adapter", "mine", "mine"]


def test_an_evaluation_is_kept(run):
    of = {"validation_file": "v.txt", "max_eval_windows": None, "max_length": 64}
    assert run.saved_evaluation(of) is None
    run.save_evaluation(None, of)
    assert run.saved_evaluation(of) is None
    evaluation = Evaluation(2.5, 0.25, 100, 3)
    run.save_evaluation(evaluation, of)
    assert run.saved_evaluation(of) == evaluation
    assert run.saved_evaluation(of | {"max_eval_windows": 2}) is None, "of something else"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"of": {}, "found": {"loss": 1}}', '{"of": {}, "found": 3}'])
def test_a_damaged_evaluation_is_named(run, content):
    run.evaluation.write_text(content)
    with pytest.raises(ValueError, match=r"evaluation_before\.json"):
        run.saved_evaluation({})


def test_one_process_writes_at_a_time(tmp_path):
    made = RunDirectory(tmp_path / "deep" / "run")
    with made.writing():
        with made.writing():  # the same one again
            assert made.directory.is_dir()
        other = RunDirectory(made.directory)
        with pytest.raises(errors.FileError, match="deep/run is in use by another process"), other.writing():
            pass
        made.append_metrics({"step": 0})
    with other.writing():
        assert other.read_metrics() == [{"step": 0}]
    assert [path.name for path in made.directory.iterdir()] == ["metrics.jsonl"]


def test_a_directory_that_stays_empty_goes_again(tmp_path):
    (tmp_path / "there").mkdir()
    for place in (tmp_path / "there" / "deep" / "run", tmp_path / "run"):
        with pytest.raises(ZeroDivisionError), RunDirectory(place).writing():
            assert place.is_dir()
            1 / 0  # noqa: B018
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with RunDirectory(tmp_path / "there").writing():
        pass
    assert (tmp_path / "there").is_dir(), "it was there before"


def test_a_directory_goes_while_it_is_locked(tmp_path, monkeypatch):
    """Else another process could have it in between, and lose it."""
    held, real = [], Path.rmdir

    def rmdir(place):
        with pytest.raises(errors.FileError, match="in use"), atomic.locked(place):
            pass
        held.append(place)
        real(place)

    monkeypatch.setattr(Path, "rmdir", rmdir)
    with RunDirectory(tmp_path / "run").writing():
        pass
    assert held == [tmp_path / "run"]


def test_what_a_run_leaves_before_its_first_checkpoint(run):
    assert run.is_before_checkpoint()
    for name in (
        "metrics.jsonl",
        "evaluation_before.json",
        "generation_config.json",
        f"{temporaries.TEMPORARY_PREFIX}0-1-x",
    ):
        (run.directory / name).touch()
    assert run.is_before_checkpoint()
    run.adapter.mkdir()
    (run.adapter / "chat_template.jinja").touch()
    assert run.is_before_checkpoint()
    (run.adapter / "adapter_model.safetensors").touch()
    assert not run.is_before_checkpoint()
    shutil.rmtree(run.adapter)
    (run.directory / "mine.txt").touch()
    assert not run.is_before_checkpoint()


def test_finishing_writes_everything_that_a_reader_needs(run):
    for row in rows(3):
        run.append_metrics(row)
    config = resolve(TrainConfig(train_file="t.txt", device="cpu"))
    run.finish({"loss_after": None, "steps": 3}, config, DataReport(5, 50, 45, 1, 0), watched())
    record = json.loads((run.directory / "run.json").read_text())
    assert record["loss_after"] is None and record["steps"] == 3
    assert record["settings"]["train_file"] == "t.txt" and record["settings"]["weights"] == "file"
    given = {"rows": 5, "tokens": 50, "trained_tokens": 45, "truncated_rows": 1, "dropped_rows": 0}
    unused = ("converted_rows", "masked_tokens", "packed_length", "packed_rows", "truncated_tokens")
    unused += ("split_conversations", "split_rows", "masked_messages", "shortened_messages", "chat_rows", "string_rows")
    unused += ("unopened_rows",)
    assert record["data"] == given | dict.fromkeys(unused, 0) | {"unused_keys": {}}
    assert record["environment"]["versions"]["torch"] and record["environment"]["threads"] >= 1
    assert record["plots"] == ["loss.png", "memory.png", "time_per_block.png"]
    assert all((run.directory / name).read_bytes().startswith(PNG) for name in record["plots"])
    assert not [p for p in run.directory.iterdir() if p.name.startswith(temporaries.TEMPORARY_PREFIX)]


@pytest.mark.parametrize(("file", "key"), [("run.json", "settings"), ("checkpoint/state.json", "config")])
def test_an_adapter_knows_the_settings_of_its_run(tmp_path, file, key):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "checkpoint").mkdir()
    assert run_settings_beside(adapter) is None
    settings = {"train_file": "chats.jsonl", "max_length": 64, "of_another_version": 1}
    strict_json.write_json(tmp_path / file, strict_json.sealed({key: settings}))
    found = run_settings_beside(adapter)
    assert (found.train_file, found.max_length) == ("chats.jsonl", 64)
    assert run_settings_beside(tmp_path / "elsewhere") is None, "it is not this run's adapter"
    strict_json.write_json(tmp_path / file, strict_json.sealed({key: 5}))
    with pytest.raises(errors.FileError, match=f"it has no {key}"):
        run_settings_beside(adapter)
