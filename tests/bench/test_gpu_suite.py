"""The GPU suite, rehearsed on the CPU: every part runs, failures are recorded, and checks can fail."""

import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch

from mebp_triton.kernels.accuracy import judge
from mebp_triton.kernels.reference import decode
from mebp_triton.kernels.tables import parse_table

PARTS = ["environment", "compile", "correctness", "paged", "graphs", "profile", "training", "speed", "tune", "memory"]
HAS_PEER = importlib.util.find_spec("bitsandbytes") is not None


def test_every_part_is_rehearsed(rehearsal):
    _, record, done = rehearsal
    assert {name: part["error"] for name, part in record["parts"].items()} == dict.fromkeys(PARTS)
    assert all(part["status"] == "done" and not part["failures"] for part in record["parts"].values())
    assert done.returncode == 0
    assert record["dry_run"] is True and record["format"] == 1


def test_nothing_is_left_out_and_no_section_is_empty(rehearsal):
    _, record, _ = rehearsal
    results = {name: part["results"] for name, part in record["parts"].items()}
    assert not [name for name, found in results.items() if "left_out" in found]
    sections = {"linear", "groups", "lora_layer", "embedding", "cross_entropy", "routes", "repeats", "compiled"}
    assert results["correctness"].keys() == sections
    assert all(results["correctness"][name] for name in sections)
    linear = results["correctness"]["linear"]
    kinds = {(row["scheme"], row["group_size"], row["bits"], row["two_level"], row["dtype"]) for row in linear}
    assert len(kinds) == (3 * 3 + 2 + 3) * 2
    assert ("codebook", 32, 4, True, "float32") in kinds  # what a new store has
    gradients = {row["gradient"] for row in results["correctness"]["lora_layer"]}
    assert gradients == {"y", "dx", "dbias", "da", "db"}
    assert {row["route"] == "panel" for row in results["correctness"]["routes"]} == {True, False}
    assert len(results["environment"]["copy_gb_s"]) == 2 and min(results["environment"]["copy_gb_s"]) > 0


def test_every_side_is_timed_with_all_its_samples(rehearsal):
    _, record, _ = rehearsal
    found = record["parts"]["speed"]["results"]
    sides = {"cublas", "ours", "ours_panel", "dequantise_cublas"} | (
        {"ours_nf4", "bitsandbytes"} if HAS_PEER else set()
    )
    assert len(found["rows"]) == 2 * 2  # M, and forward and dX
    assert len(found["groups"]) == 2 * 2  # M, and with and without gradients
    for row in found["groups"]:
        assert row["median_us"].keys() == sides - {"ours_panel"} | {"ours_symmetric"}
    for row in found["rows"]:
        assert row["median_us"].keys() == row["samples_us"].keys() == sides
        assert all(value > 0 for values in row["samples_us"].values() for value in values)
    assert found["not_run"].keys() == (set() if HAS_PEER else {"bitsandbytes"})


def test_whole_steps_of_all_sides(rehearsal):
    _, record, _ = rehearsal
    found = record["parts"]["training"]["results"]
    sides = {"mebp", "mebp_files", "mebp_least_memory"} | ({"peft_nf4"} if HAS_PEER else set())
    assert {row["side"] for row in found["rows"]} == sides
    assert bool(found["not_run"]) is not HAS_PEER
    for row in found["rows"]:
        assert len(row["losses"]) == len(row["step_seconds"]) == 2
        assert row["losses"][0] == pytest.approx(math.log(128), rel=0.1)  # random weights know nothing


def test_paged_runs_equal_a_resident_one(rehearsal):
    _, record, _ = rehearsal
    rows = record["parts"]["paged"]["results"]["rows"]
    assert [row["model"] for row in rows] == ["dense"] * (3 * 3 + 2) + ["mixture"] * 3
    assert {row["different"] for row in rows} == {0}
    tensors = 2 * 7 * 2  # adapters of two blocks
    assert {row["compared"] for row in rows[:11]} == {3 * (1 + tensors) + tensors}
    assert len({row["compared"] for row in rows[11:]}) == 1


def test_the_profile_says_where_the_time_goes(rehearsal):
    _, record, _ = rehearsal
    rows = record["parts"]["profile"]["results"]["rows"]
    assert [row["side"] for row in rows] == ["mebp", *["peft_nf4"] * HAS_PEER]
    for row in rows:
        assert row["launches"] > 100 and len(row["longest"]) == 30
        assert row["busy_seconds"] > 0 and row["step_seconds"] >= row["host_seconds"] > 0


def test_the_tuned_table_lies_beside_the_results(rehearsal):
    output, record, _ = rehearsal
    found = record["parts"]["tune"]["results"]
    table = parse_table(json.loads((output.parent / found["table"]).read_text()), "cpu")
    assert len(table) == found["entries"] == 2
    assert all(entry.provenance == "measured" for entry in table.values())
    assert (output.parent / found["log"]).exists()


# --- parts that go wrong --------------------------------------------------------------------------------------------


@pytest.fixture
def suite(bench_path):
    return importlib.import_module("gpu_suite")


def breaks(name, chosen, deadline, kept):
    kept.write_text(json.dumps({"results": {"rows": [1]}, "failures": [], "error": None}))
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(name, chosen, deadline, kept):
    kept.write_text(json.dumps({"results": {"rows": [1]}, "failures": [], "error": None}))
    time.sleep(60)


def does_not_hold(name, chosen, deadline, kept):
    kept.write_text(json.dumps({"results": {}, "failures": ["one", "two"], "error": None}))


@pytest.mark.parametrize(
    ("child", "error", "kept"),
    [
        (breaks, "the process ended with exit code -9", {"rows": [1]}),
        (hangs, "killed after 1 s", {"rows": [1]}),
        (does_not_hold, "2 checks failed; the first: one", {}),
    ],
)
def test_a_part_that_fails_is_recorded(suite, monkeypatch, tmp_path, child, error, kept):
    monkeypatch.setattr(suite, "child_main", child)
    found = suite.run_part("memory", Namespace(), 1.0, tmp_path / "kept.json")
    assert found["status"] == "failed"
    assert found["error"] == error
    assert found["results"] == kept


def test_a_part_that_raises_does_not_stop_the_next(suite, monkeypatch, tmp_path):
    def part(name):
        def run(session):
            session.results["ran"] = name
            if name == "memory":
                raise RuntimeError("out of luck")

        return run

    monkeypatch.setattr(suite, "part", part)
    output = tmp_path / "results.json"
    chosen = Namespace(output=output, dry_run=True, parts=["memory", "graphs"], minutes=1.0, commit="abc")
    assert suite.run(chosen, time.monotonic() + 60, tmp_path) == 1
    record = json.loads(output.read_text())
    assert record["commit"] == "abc"
    assert record["parts"]["memory"]["error"] == "RuntimeError: out of luck"
    assert record["parts"]["memory"]["results"] == {"ran": "memory"}
    assert record["parts"]["graphs"]["status"] == "done"


def test_unknown_parts_are_refused(bench_path, tmp_path):
    command = [sys.executable, bench_path / "gpu_suite.py", "--output", tmp_path / "x.json", "--parts", "speed,sped"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "got sped" in done.stderr


def test_what_cannot_be_measured_or_written_is_refused_in_a_line(bench_path, tmp_path, monkeypatch, capsys):
    suite = importlib.import_module("gpu_suite")
    (tmp_path / "text").write_text("")
    for output in (tmp_path, tmp_path / "text" / "x.json"):
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--dry-run", f"--output={output}"])
        with pytest.raises(SystemExit) as ended:
            suite.main()
        assert ended.value.code == 2 and "--output cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    chosen = Namespace(dry_run=False, output=tmp_path / "x.json")
    assert suite.run(chosen, time.monotonic() + 60, tmp_path) == 2
    assert "this torch has no CUDA" in capsys.readouterr().err and not chosen.output.exists()


def test_a_missing_peer_is_named(bench_path, monkeypatch):
    timed = importlib.import_module("gpu.timed")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert timed.missing_peers()["bitsandbytes"].startswith("ModuleNotFoundError")


# --- checks can fail ------------------------------------------------------------------------------------------------


def test_the_rule_sees_what_is_wrong(bench_path):
    operands = importlib.import_module("gpu.operands")
    truth = torch.randn(8, 16, dtype=torch.float64)
    same = truth.float()
    assert judge(same.clone(), same, truth)["ok"]
    for wrong in (same + 1e-4, same.where(truth < truth.max(), 0), same * float("nan"), same[:4]):
        found = judge(wrong, same, truth)
        assert not found["ok"]
        json.dumps(found, allow_nan=False)
    assert not operands.close(same * 1.1, same, 1e-2)
    assert not operands.close(same * float("nan"), same, 1e-2)


def test_a_paged_run_that_differs_is_a_failure(bench_path, tmp_path, monkeypatch):
    paged = importlib.import_module("gpu.paged")
    sizes = importlib.import_module("gpu.sizes")
    session = importlib.import_module("gpu.session")
    one = session.Session(torch.device("cpu"), sizes.REHEARSAL, time.monotonic() + 60, tmp_path, tmp_path / "kept.json")

    def run(_, store, scratch, weights, inputs, moments):
        yield "loss 0", torch.tensor(1.0 if weights != "file" else 1.0 + 1e-7)

    monkeypatch.setattr(paged, "run", run)
    paged.paged(one)
    assert len(one.failures) == 4 + 1 and "first in loss 0" in one.failures[0]


def test_compiling_beforehand_is_what_a_launch_finds(bench_path, tmp_path):
    """A process without a device compiles for one; compiling the same again adds nothing to the cache."""
    script = """
import time
from pathlib import Path
import torch
from gpu import compilation, session, sizes
one = session.Session(torch.device("cpu"), sizes.REHEARSAL, time.monotonic() + 60, Path(), Path())
unit = next(iter(compilation.units(one)))
compilation._become(90)
for one in (unit, unit._replace(bias=not unit.bias), unit):
    print(compilation.compile_unit(one))
"""
    cache = tmp_path / "cache"
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(bench_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, other, again = done.stdout.split()
    assert first == again != other
    assert len(list(cache.rglob("_matmul_kernel.cubin"))) == 2


def test_items_that_do_not_fit_are_counted(bench_path, tmp_path):
    session = importlib.import_module("gpu.session")
    sizes = importlib.import_module("gpu.sizes")
    over = session.Session(torch.device("cpu"), sizes.REHEARSAL, time.monotonic() - 1, tmp_path, tmp_path / "kept.json")
    assert list(over.while_time("rows", [1, 2, 3])) == []
    assert over.results == {"left_out": {"rows": 3}}


@pytest.mark.skipif(not HAS_PEER, reason="bitsandbytes is a peer, no dependency")
def test_bitsandbytes_and_we_have_the_same_weight(bench_path):
    from bitsandbytes import functional

    operands = importlib.import_module("gpu.operands")
    packed, state, ours = operands.nf4_pair(24, 128, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(decode(ours, torch.float32), functional.dequantize_4bit(packed, state))
