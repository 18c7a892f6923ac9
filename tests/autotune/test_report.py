"""The report of tuning: rates, shares of the ceilings, and by how much the others lost."""

import builtins
import json
from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune.ceilings import Ceilings
from mebp_triton.autotune.log import Log, Record, Trial
from mebp_triton.autotune.measure import bytes_moved
from mebp_triton.autotune.report import ceilings_of, describe_route, draw, nominal_ceilings, rows
from mebp_triton.kernels.configs import PANEL, Panel, Problem, TileConfig
from mebp_triton.kernels.tables import Entry, bucket

PROBLEM = Problem("matmul", 16, 896, 4864, "symmetric", 64, torch.float16)
FAST, SLOW, BAD = TileConfig(16, 64, 128), TileConfig(32, 64, 64, 8, 3, 4, False, True), TileConfig(64, 64, 64)
CEILINGS = Ceilings(50.0, {"float16": 5.0, "bfloat16": 6.0})
NOMINAL = Ceilings(100.0, {"float16": 10.0})


def found(provenance="measured", measured_m=None):
    device = "A device" if provenance == "measured" else None
    entry = Entry(bucket(PROBLEM), FAST, provenance, 100.0, device, {})
    trials = (
        Trial(SLOW, 90.0, 130.0, (130.0,), "clearly slower"),
        Trial(FAST, 100.0, 100.0, (100.0,)),
        Trial(PANEL, 120.0, 110.0, (110.0,)),
        Trial(BAD, reason="spills"),
        Trial(TileConfig(16, 16, 64), 500.0),
    )
    record = Record(PROBLEM, trials, device, {}, measured_m)
    return {entry.problem: entry}, Log("sm_87", {entry.problem: record}, {"A device": CEILINGS})


def test_a_measured_row():
    table, log = found()
    (row,) = rows(table, log, NOMINAL)
    assert (row.kernel, row.m, row.n, row.k, row.dtype) == ("matmul", 16, 896, 4864, "float16")
    assert (row.provenance, row.device, row.route, row.time_us) == ("measured", "A device", "16x64x128 4w 2s", 100.0)
    assert row.gb_s == pytest.approx(bytes_moved(PROBLEM) / 100e-6 / 1e9)
    assert row.tflop_s == pytest.approx(2 * 16 * 896 * 4864 / 100e-6 / 1e12)
    assert row.of_copy == pytest.approx(row.gb_s / 50.0) and row.of_matmul == pytest.approx(row.tflop_s / 5.0)
    assert [(loss.route, loss.time_us, loss.reason) for loss in row.lost] == [
        ("panel 16 MiB", 110.0, None),
        ("32x64x64 8w 3s split4 right sums", 130.0, "clearly slower"),
        ("64x64x64 4w 2s", None, "spills"),
    ]
    assert [loss.slower_by for loss in row.lost] == [pytest.approx(0.1), pytest.approx(0.3), None]
    assert json.loads(json.dumps(row.to_json()))["lost"][0]["route"] == "panel 16 MiB"


def test_a_predicted_row_is_held_against_the_data_sheet():
    table, log = found("static")
    (row,) = rows(table, log, NOMINAL)
    assert row.provenance == "static" and row.of_copy == pytest.approx(row.gb_s / 100.0)
    assert [loss.route for loss in row.lost][:2] == ["32x64x64 8w 3s split4 right sums", "panel 16 MiB"]
    assert row.lost[0].slower_by == pytest.approx(-0.1)
    assert ceilings_of([row], log, NOMINAL) == {"data sheet": NOMINAL}


def test_what_bounds_the_winner():
    """It is what takes the most clocks in the model; nothing is known without a log."""
    table, log = found("static")
    (record,) = log.records.values()
    clocks = {"tensor cores": 256, "shared memory": 1216, "issue": 500}
    trials = tuple(
        replace(one, clocks=clocks, note="not executed") if one.route == FAST else one for one in record.trials
    )
    (row,) = rows(table, Log("sm_87", {bucket(PROBLEM): replace(record, trials=trials)}), NOMINAL)
    assert (row.bound, row.clocks, row.note) == ("shared memory", clocks, "not executed")
    assert json.loads(json.dumps(row.to_json()))["clocks"] == clocks
    (row,) = rows(table, Log("sm_87"), NOMINAL)
    assert (row.bound, row.clocks, row.note) == (None, {}, None)


def test_what_was_measured_with_fewer_tokens_says_so():
    (row,) = rows(*found(measured_m=8), NOMINAL)
    assert row.m == 8 and row.tflop_s == pytest.approx(2 * 8 * 896 * 4864 / 100e-6 / 1e12)


def test_without_a_log_there_are_no_rates():
    table, log = found()
    (row,) = rows(table, Log("sm_87"), NOMINAL)
    assert (row.n, row.k, row.gb_s, row.of_copy, row.lost) == (1024, 4096, None, None, ())
    # A record of another device does not belong to this entry.
    (record,) = log.records.values()
    other = Record(record.problem, record.trials, "Another", {})
    (row,) = rows(table, Log("sm_87", {bucket(PROBLEM): other}), NOMINAL)
    assert row.gb_s is None


def test_ceilings_of_what_is_shown():
    (row,) = rows(*found(), NOMINAL)
    assert ceilings_of([row], found()[1], NOMINAL) == {"A device": Ceilings(50.0, {"float16": 5.0})}
    assert ceilings_of([row], Log("sm_87"), NOMINAL) == {}


def test_nominal_ceilings():
    assert nominal_ceilings("sm_75").tflop_s.keys() == {"float16"}
    orin = nominal_ceilings("sm_87")
    assert orin.gb_s == 68 and orin.tflop_s["bfloat16"] == pytest.approx(10, rel=0.05)


def test_routes_in_words():
    assert describe_route(Panel(64)) == "panel 64 MiB" and describe_route(BAD) == "64x64x64 4w 2s"


@pytest.mark.parametrize("provenance", ["measured", "static"])
def test_a_plot(tmp_path, provenance):
    table, log = found(provenance)
    made = rows(table, log, NOMINAL)
    draw(made, ceilings_of(made, log, NOMINAL), "title", tmp_path / "plot")
    assert (tmp_path / "plot").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_plot(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing to plot"):
        draw(rows(found()[0], Log("sm_87"), NOMINAL), {}, "title", tmp_path / "plot")
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs matplotlib: pip install 'mebp-triton\[plots\]'"):
        draw([], {}, "title", tmp_path / "plot")
