"""Result files as tables and plots."""

import json
import subprocess
import sys

import pytest


@pytest.fixture
def make_page(bench_path, tmp_path):
    def make(*results):
        command = [sys.executable, bench_path / "report.py", *results, "--output", tmp_path / "page.md"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done, tmp_path / "page.md"

    return make


def test_a_rehearsal_becomes_a_page_that_says_so(rehearsal, make_page):
    output, record, _ = rehearsal
    done, page = make_page(output)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "**A rehearsal" in text
    assert record["commit"] is None or record["commit"] in text
    for part in record["parts"]:
        assert f"| {part} | done |" in text
    row = record["parts"]["speed"]["results"]["rows"][0]
    assert f"| {row['n']} x {row['k']} | {row['m']} | " in text
    for kernel in ("matmul", "matmul_dx"):
        plot = page.with_name(f"page-rehearsal-{kernel}.png")
        assert plot.name in text
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_memory_by_sequence_length_is_drawn_where_it_was_measured(rehearsal, make_page, tmp_path):
    _, record, _ = rehearsal
    for row in record["parts"]["training"]["results"]["rows"]:
        row |= {"peak_device_bytes": 3 << 20, "peak_reserved_bytes": 4 << 20}
    path = tmp_path / "device.json"
    path.write_text(json.dumps(record))
    _, page = make_page(path)
    assert "page-device-training.png" in page.read_text()
    assert (tmp_path / "page-device-training.png").exists()


def test_a_run_that_broke_off_still_makes_a_page(make_page, tmp_path):
    killed = {"status": "failed", "error": "killed | after 1 s", "seconds": 1.0, "results": {}}
    record = {"dry_run": False, "started": "now", "commit": "abc", "changed_files": True, "parts": {"speed": killed}}
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(record))
    done, page = make_page(path)
    assert done.returncode == 0, done.stderr
    assert "| speed | failed | 1 | killed \\| after 1 s |" in page.read_text()
    assert "commit abc with uncommitted changes" in page.read_text()


def test_benchmarks_are_a_row_a_problem_and_a_column_a_side(make_page, tmp_path):
    entries = [
        {"group": "forward", "problem": "M=1", "side": side, "median_seconds": seconds}
        for side, seconds in (("panel", 0.0015), ("torch", 0.25))
    ]
    machine = {"cpu": "some CPU", "versions": {"torch": "2"}, "threads": 1}
    record = {
        "machine_info": machine,
        "timers": ["time.perf_counter"],
        "commit": "abc",
        "datetime": "now",
        "benchmarks": entries,
    }
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(record))
    _, page = make_page(path)
    text = page.read_text()
    assert "| problem | panel | torch |" in text
    assert "| M=1 | 1.5 | 250 |" in text


def test_other_files_are_refused(make_page, tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    done, page = make_page(path)
    assert done.returncode == 2
    assert "is no result" in done.stderr
    assert not page.exists()
