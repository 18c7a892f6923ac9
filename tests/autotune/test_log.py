"""The tuning log is read as it was written. Anything else is ignored with a warning."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mebp_triton.autotune.ceilings import Ceilings
from mebp_triton.autotune.log import Log, Record, Trial, keep_measurements, log_path, parse_log, read_log
from mebp_triton.kernels.configs import PANEL, Panel, Problem, TileConfig
from mebp_triton.kernels.tables import bucket

PROBLEM = Problem("matmul", 16, 896, 896, "symmetric", 64, torch.float16)
TILE = TileConfig(16, 64, 128, split=4)
CLOCKS = {"tensor cores": 256, "shared memory": 0, "latency": 1400.5}
RECORD = Record(
    PROBLEM,
    (
        Trial(TILE, 10.0, 12.5, (12.0, 12.5, 13.0), clocks=CLOCKS, note="not executed: line 7: no such instruction"),
        Trial(PANEL, 20.0, 50.0, (50.0, 50.0), "clearly slower than the best before it"),
        Trial(Panel(64), 20.0, 40.0, (40.0,)),
        Trial(replace(TILE, scale_sums=True, block_k=64), reason="spills 8 bytes a thread"),
    ),
    "A device",
    {"triton": "3.9.0", "torch": "2.13.0"},
    16,
)


def whole():
    return Log("sm_87", {bucket(PROBLEM): RECORD}, {"A device": Ceilings(60.0, {"float16": 9.5})})


def test_what_is_written_is_read():
    value = json.loads(json.dumps(whole().to_json(), allow_nan=False))
    assert parse_log(value, "sm_87") == whole()
    routes = [trial["route"] for trial in value["records"][0]["trials"]]
    assert routes[1:3] == [None, {"panel_mib": 64}]


def test_the_width_of_codes():
    wide = replace(RECORD, problem=replace(PROBLEM, group_size=16, bits=8), trials=RECORD.trials[:2])
    log = Log("sm_87", {bucket(record.problem): record for record in (RECORD, wide)})
    value = json.loads(json.dumps(log.to_json()))
    assert [record["problem"].get("bits") for record in value["records"]] == [None, 8]
    assert parse_log(value, "sm_87") == log
    value["records"][1]["problem"]["bits"] = 4
    with pytest.raises(ValueError, match="group_size must be one of"):
        parse_log(value, "sm_87")


def test_a_log_of_format_1_is_read():
    """Its trials have neither clocks nor notes."""
    value = json.loads(json.dumps(whole().to_json()))
    value["format"] = 1
    for trial in value["records"][0]["trials"]:
        del trial["clocks"], trial["note"]
    (record,) = parse_log(value, "sm_87").records.values()
    assert record == replace(RECORD, trials=tuple(replace(one, clocks={}, note=None) for one in RECORD.trials))


def test_no_file_is_an_empty_log(tmp_path):
    assert log_path(Path("a/sm_87.json")) == Path("a/sm_87.json.log")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_log(tmp_path / "none.log", "sm_87") == Log("sm_87")


def change(path, value):
    """The JSON of the log with the value at ``path`` replaced, or removed (``...``)."""
    made = json.loads(json.dumps(whole().to_json()))
    place = made
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(made)


TRIAL = ("records", 0, "trials", 0)
BROKEN = {
    "cut short": json.dumps(whole().to_json())[:-7],
    "binary": "\0\1\2",
    "a list": "[]",
    "nested without end": "[" * 100_000,
    "another format": change(("format",), 3),
    "another architecture": change(("architecture",), "sm_90"),
    "a key too many": change(("more",), 1),
    "no records": change(("records",), {}),
    "a time that no float holds": change((*TRIAL, "time_us"), 10**400),
    "a configuration that no device has room for": change((*TRIAL, "route", "block_m"), 1 << 40),
    "a key twice": json.dumps(whole().to_json()).replace('"format": 2', '"format": 2, "format": 2'),
    "no trials": change(("records", 0, "trials"), None),
    "a record without versions": change(("records", 0, "versions"), ...),
    "versions that are numbers": change(("records", 0, "versions", "torch"), 2),
    "a device that is a number": change(("records", 0, "device"), 3),
    "an M of zero": change(("records", 0, "measured_m"), 0),
    "an unknown kernel": change(("records", 0, "problem", "kernel"), "embedding"),
    "a kernel that is a list": change(("records", 0, "problem", "kernel"), ["matmul"]),
    "true for a size": change(("records", 0, "problem", "m"), True),
    "an unknown dtype": change(("records", 0, "problem", "dtype"), "int8"),
    "a time of zero": change((*TRIAL, "time_us"), 0),
    "a time that is not a number": change((*TRIAL, "time_us"), float("nan")),
    "an endless time": change((*TRIAL, "predicted_us"), float("inf")),
    "samples that are texts": change((*TRIAL, "samples_us"), ["1"]),
    "an option of Triton's": change((*TRIAL, "route", "ir_override"), "/tmp/x"),
    "a block of 17": change((*TRIAL, "route", "block_m"), 17),
    "a flag that is a number": change((*TRIAL, "route", "weight_left"), 1),
    "a configuration that does not suit": change((*TRIAL, "route", "scale_sums"), True),
    "a reason that is a number": change((*TRIAL, "reason"), 1),
    "a note that is a list": change((*TRIAL, "note"), []),
    "clocks of what bounds nothing": change((*TRIAL, "clocks", "registers"), 1),
    "clocks below zero": change((*TRIAL, "clocks", "issue"), -1),
    "clocks that are a number": change((*TRIAL, "clocks"), 1),
    "ceilings below zero": change(("ceilings", "A device", "gb_s"), -1),
    "ceilings without rates": change(("ceilings", "A device", "tflop_s"), []),
}


@pytest.mark.parametrize("name", BROKEN)
def test_anything_else_is_ignored_with_a_warning(tmp_path, name):
    (tmp_path / "sm_87.log").write_text(BROKEN[name])
    with pytest.warns(UserWarning, match=r"sm_87\.log is ignored: .*; remove it, or tune again") as caught:
        assert read_log(tmp_path / "sm_87.log", "sm_87") == Log("sm_87")
    assert "\n" not in str(caught[0].message)


def test_a_directory_is_no_log(tmp_path):
    with pytest.warns(UserWarning, match="not a regular file"):
        assert read_log(tmp_path, "sm_87") == Log("sm_87")


def test_predictions_do_not_wipe_out_measurements():
    other = TileConfig(32, 64, 64)
    predicted = Record(
        PROBLEM, (Trial(other, 5.0), Trial(TILE, 6.0, clocks={"issue": 3}), Trial(PANEL, 7.0)), None, {"triton": "4"}
    )
    kept = keep_measurements(RECORD, predicted)
    assert (kept.device, kept.versions, kept.measured_m) == ("A device", RECORD.versions, 16)
    assert kept.trials == (
        Trial(other, 5.0),
        replace(RECORD.trials[0], predicted_us=6.0, clocks={"issue": 3}, note=None),
        replace(RECORD.trials[1], predicted_us=7.0),
    )
    # A new measurement, and a record without a predecessor, are taken as they are.
    assert keep_measurements(None, predicted) is predicted
    assert keep_measurements(predicted, RECORD) is RECORD
    newer = replace(RECORD, device="Another")
    assert keep_measurements(RECORD, newer) is newer
