"""The selection study: rows are settings, runs repeat to the bit, and intervals are Student's."""

import json
import math
import sys
from pathlib import Path

import pytest
from runs import sentences

from mebp_triton.training.settings import TrainConfig

STUDY = Path(__file__).resolve().parent.parent.parent / "bench" / "study"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(STUDY))
    try:
        import grid
        import report
        import run

        yield grid, run, report
    finally:
        sys.path.remove(str(STUDY))
        for name in ("grid", "run", "report"):
            sys.modules.pop(name, None)


@pytest.fixture
def store(shared_store):
    return shared_store("llama", config={"num_hidden_layers": 4})


def test_every_row_is_a_setting(study):
    grid, run, _ = study
    for part, (rows, _, seeds) in grid.PARTS.items():
        assert len(rows) == len({json.dumps(row, sort_keys=True) for row in rows.values()}), part
        assert len(seeds) >= 3 or part in ("divergence", "rates")
        for row in rows.values():
            config = run.settings_of(row, 0, 3, Path("run"))
            assert isinstance(config, TrainConfig) and config.max_steps == 3
            assert all(getattr(config, name) == value for name, value in row.items())
    modes = {(row["selection_mode"], row["selected_ratio"]) for row in grid.MODES.values()}
    assert len(modes) == 10 and ("full", 1.0) in modes


def test_runs_are_evaluated_after_equal_steps_and_are_as_long_as_equal_time_needs(study):
    grid, run, _ = study
    for part, (rows, _, _) in grid.PARTS.items():
        for name in rows:
            steps = run.evaluated_after(name, part)
            assert steps[0] == grid.STEPS and steps == sorted(set(steps))
    assert len(run.evaluated_after("identity-0.5-random-momentum", "schedules")) == 2
    assert run.evaluated_after("full", "modes") == [grid.STEPS]


def test_every_row_is_timed_as_some_row(study):
    grid, _, _ = study
    for rows in (grid.MODES, grid.SCHEDULES, grid.BASELINES):
        assert all(grid.timed_as(name) in grid.TIMED for name in rows if name != "full")


def test_a_run_is_repeated_to_the_bit_and_evaluated(study, store, tmp_path):
    grid, run, _ = study
    texts = []
    for number in range(2):
        texts.append(tmp_path / f"{number}.txt")
        texts[-1].write_text(sentences(200, number))
    row = grid.MODES["identity-0.5-cyclic-momentum"] | {"max_length": 16}
    found = [run.train(store, texts, row, 1, 4, [2, 4]) for _ in range(2)]
    assert found[0]["losses"] == found[1]["losses"] and len(found[0]["losses"]) == 4
    assert list(found[0]["evaluations"]) == [2, 4] and "diverged" not in found[0]
    assert found[0]["evaluations"][4][0] < found[0]["evaluations"][2][0]


def test_instructions_are_held_out_by_topic(study, tmp_path):
    _, run, _ = study
    training, held_out = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in run.write_instructions(tmp_path)
    )
    assert len(training) > 2 * len(held_out) > 100
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in held_out}
    assert all(row["completion"] for row in training + held_out)


def test_a_row_is_timed_step_by_step_beside_full(study, store, tmp_path, monkeypatch):
    grid, run, _ = study
    texts = [tmp_path / "text.txt"] * 2
    texts[0].write_text(sentences(200, 0))
    monkeypatch.setattr(run, "PAIRS", 3)
    found = run._beside_full(store, texts, {"freeze-0.5": grid.MODES["freeze-0.5"]}, {"max_length": 16})
    full, mine = found["seconds"]["freeze-0.5"]
    assert len(full) == len(mine) == 3 and found["relative"]["freeze-0.5"] == sum(mine) / sum(full)
    first = found["first_losses"]["freeze-0.5"]
    assert first[0] == first[1]


def test_bias_is_none_where_nothing_above_is_skipped(study, store, tmp_path, monkeypatch):
    _, run, report = study
    text = tmp_path / "text.txt"
    text.write_text(sentences(400, 0))
    found = run.bias(store, [text, text], batches=1)
    assert {row[3] for row in found["rows"]} == {0, 1, 2, 3}
    alone = [row for row in found["rows"] if row[3] == 3]  # nothing lies above the last block
    assert alone and all(row[4] == pytest.approx(1) and row[5] == pytest.approx(1) for row in alone)
    assert any(row[4] < 0.999 for row in found["rows"] if row[3] == 0)
    (tmp_path / "bias.json").write_text(json.dumps(found))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert len(report.bias_summary()) == 2 + 6


def made_run(*looks, **more):
    return {"evaluations": {str(step): [loss, 0.5] for step, loss in looks}, "losses": [3.0] * 5} | more


def test_intervals(study):
    _, _, report = study
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    full = {seed: made_run((40, 2.5 + seed)) for seed in range(3)}
    rows = {seed: made_run((40, 3.0 + seed), (50, 2.0 + seed)) for seed in range(3)}
    found = report.compared(rows, full)
    assert (found.loss, found.steps, found.seeds, found.diverged) == ((0.5, 0.0), 40, 3, 0)
    assert report.compared(rows, full, 40 / 45).loss[0] == pytest.approx(0.0)  # half of the way
    assert report.compared(rows, full, 1.2).steps == 40 and report.compared(rows, full, 0.1).steps == 50
    rows[1] = made_run((40, 9.0), diverged="loss is nan")
    found = report.compared(rows, full)
    assert (found.loss[0], found.seeds, found.diverged) == (0.5, 2, 1)


def test_the_report_is_made_of_files(study, tmp_path, monkeypatch, capsys):
    grid, _, report = study
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    for part, (rows, _, seeds) in grid.PARTS.items():
        (tmp_path / part).mkdir()
        for name in rows:
            for seed in seeds:
                made = made_run((40, 3.0), (64, 2.9), peak_rss_bytes=2**29)
                (tmp_path / part / f"{name}-seed{seed}.json").write_text(json.dumps(made))
    relative = {name: 0.8 for name in grid.TIMED}
    (tmp_path / "speed.json").write_text(json.dumps({"relative": relative}))
    (tmp_path / "speed-256.json").write_text(json.dumps({"selective": {"relative": relative}, "threads": 2}))
    bias = [[0, 0.5, "cyclic", block, cosine, 1.0] for block in range(4) for cosine in (0.5, 1.0)]
    (tmp_path / "bias.json").write_text(json.dumps({"rows": bias}))
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main()
    printed = capsys.readouterr().out
    for name in (*grid.TIMED, *grid.DIVERGENCE):
        assert name in printed
    assert (tmp_path / "plots" / "selection-loss.png").exists() and "1.25x" in printed
