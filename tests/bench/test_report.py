"""Pages of tables and plots, made of result files."""

import importlib
import json
import sys

import pytest


@pytest.fixture
def make_page(bench_path, tmp_path):
    """Makes a page of result files; returns its path."""

    def make(*results):
        importlib.import_module("report").main([*map(str, results), "--output", str(tmp_path / "page.md")])
        return tmp_path / "page.md"

    yield make
    sys.modules.pop("report", None)  # the study has a module of that name as well


def test_a_rehearsal_becomes_a_page_that_says_so(rehearsal, make_page):
    output, record, _ = rehearsal
    page = make_page(output)
    text = page.read_text()
    assert "**A rehearsal" in text
    assert record["commit"] is None or record["commit"] in text
    for part in record["parts"]:
        assert f"| {part} | done |" in text
    row = record["parts"]["speed"]["results"]["rows"][0]
    assert f"| {row['n']} x {row['k']} | {row['m']} | " in text
    group = record["parts"]["speed"]["results"]["groups"][0]
    assert f"| {', '.join(f'{n} x {k}' for n, k in group['shapes'])} | {group['m']} | forward | " in text
    assert "| file | file | file | 115 | 0 |" in text  # of part paged
    assert f"| mebp | {record['parts']['profile']['results']['rows'][0]['launches']} | " in text
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
    page = make_page(path)
    assert "page-device-training.png" in page.read_text()
    assert (tmp_path / "page-device-training.png").exists()


def test_a_run_that_broke_off_still_makes_a_page(make_page, tmp_path):
    killed = {"status": "failed", "error": "killed | after 1 s", "seconds": 1.0, "results": {}}
    record = {"dry_run": False, "started": "now", "commit": "abc", "changed_files": True, "parts": {"speed": killed}}
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(record))
    page = make_page(path)
    assert "| speed | failed | 1 | killed \\| after 1 s |" in page.read_text()
    assert "commit abc with uncommitted changes" in page.read_text()


def test_benchmarks_have_a_row_per_problem_and_a_column_per_side(make_page, tmp_path):
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
    page = make_page(path)
    text = page.read_text()
    assert "| problem | panel | torch |" in text
    assert "| M=1 | 1.5 | 250 |" in text


def test_other_files_are_refused(make_page, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(SystemExit) as ended:
        make_page(path)
    assert ended.value.code == 2
    assert "is no result" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_what_cannot_be_read_or_written_is_refused_in_a_line(make_page, tmp_path, capsys):
    (tmp_path / "text.json").write_text("no results")
    for name in ("text.json", "none.json"):
        with pytest.raises(SystemExit) as ended:
            make_page(tmp_path / name)
        assert ended.value.code == 2 and f"{name} cannot be read" in capsys.readouterr().err
    (tmp_path / "page.md").mkdir()
    with pytest.raises(SystemExit) as ended:
        make_page(tmp_path / "text.json")
    assert ended.value.code == 2 and "--output cannot be written" in capsys.readouterr().err
