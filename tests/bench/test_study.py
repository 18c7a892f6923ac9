"""The selection study: its grid is what it says, a run ends in a file, and intervals are Student's."""

import json
import math
import sys
from pathlib import Path

import pytest
from runs import run_store, sentences

from mebp_triton.config import TrainConfig

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


def test_equal_time_takes_more_steps(study):
    grid, run, _ = study
    relative = {"full": 1.0, "identity-0.5-cyclic-momentum": 0.8}
    assert run.looked_at("identity-0.5-random-momentum", "schedules", relative) == [grid.STEPS, grid.STEPS * 5 // 4]
    assert run.looked_at("full", "modes", relative) == [grid.STEPS]
    assert run.looked_at("identity-0.5-cyclic-momentum", "instructions", relative) == [grid.STEPS]


def test_a_run_is_repeated_to_the_bit_and_looked_at(study, tmp_path):
    grid, run, _ = study
    store = run_store(tmp_path, num_hidden_layers=4)
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


def test_intervals(study):
    _, _, report = study
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    rows = {seed: {"evaluations": {"40": [3.0 + seed, 0.5], "50": [2.0, 0.5]}} for seed in range(3)}
    full = {seed: {"evaluations": {"40": [2.5 + seed, 0.4]}} for seed in range(3)}
    losses, accuracy, steps = report.compared(rows, full, False)
    assert losses == (0.5, 0.0) and accuracy[0] == pytest.approx(10) and steps == 40
    assert report.compared(rows, full, True)[2] == 50
