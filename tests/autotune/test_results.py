"""The files of the table and the log are merged under a lock, and never half-written."""

import os
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

from mebp_triton.autotune.log import Log, Record, log_path, read_log
from mebp_triton.autotune.results import Results, merge
from mebp_triton.kernels.configs import Problem, TileConfig
from mebp_triton.kernels.tables import Entry, bucket, read_table, user_table_path
from mebp_triton.system import strict_json

PROBLEMS = [Problem(kernel, 16, 128, 128) for kernel in ("matmul", "matmul_dx")]
TILE = TileConfig(16, 32, 64)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "tables" / "sm_87.json", "sm_87", strict_json.write_json)


def entry_of(provenance="measured", time_us=1.0, route=TILE):
    return Entry(bucket(PROBLEMS[0]), route, provenance, time_us, None, {})


def test_measured_beats_static_and_newer_beats_older():
    measured, static = entry_of(), entry_of("static")
    key = measured.problem
    assert merge({}, static) == {key: static}
    assert merge({key: static}, measured) == {key: measured}
    assert merge({key: measured}, static) == {key: measured}
    assert merge({key: measured}, entry_of(time_us=9.0)) == {key: entry_of(time_us=9.0)}
    assert merge({key: static}, entry_of("static", 9.0)) == {key: entry_of("static", 9.0)}


def test_only_its_user_may_write_there(results):
    results.add(entry_of(), Record(PROBLEMS[0], (), None, {}))
    assert stat.S_IMODE(results.path.parent.stat().st_mode) == 0o700
    assert sorted(path.name for path in results.path.parent.iterdir()) == [
        "sm_87.json",
        "sm_87.json.lock",
        "sm_87.json.log",
    ]


@pytest.mark.parametrize("garbage", ["", "{", '{"format": 1, "architecture": "sm_90", "entries": []}', "\0" * 99])
def test_the_users_own_table_is_replaced_where_it_is_damaged_or_foreign(tmp_path, monkeypatch, garbage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    results = Results(user_table_path("sm_87"), "sm_87", strict_json.write_json)
    results.check()
    results.path.parent.mkdir(parents=True, mode=0o700)
    results.path.write_text(garbage)
    log_path(results.path).write_text(garbage)
    with pytest.warns(UserWarning, match="is ignored"):
        results.add(entry_of(), Record(PROBLEMS[0], (), None, {}))
    assert results.table() == {entry_of().problem: entry_of()} and len(results.log().records) == 1


def test_what_the_user_named_is_not_written_over(results):
    with pytest.raises(ValueError, match="is no directory"):
        results.check()
    results.path.parent.mkdir()
    results.check()
    results.path.write_text("important notes")
    for call in (results.check, lambda: results.add(entry_of(), Record(PROBLEMS[0], (), None, {}))):
        with pytest.raises(ValueError, match="is there already and is no table of sm_87"):
            call()
    assert results.path.read_text() == "important notes"


def test_a_named_table_may_lie_where_everybody_writes(results):
    results.path.parent.mkdir()
    results.path.parent.chmod(0o777)
    results.check()
    for problem in PROBLEMS[:2]:
        results.add(replace(entry_of(), problem=bucket(problem)), Record(problem, (), None, {}))
    assert len(results.table()) == 2


def test_the_users_own_table_must_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = user_table_path("sm_87")
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o777)
    with pytest.raises(ValueError, match="everybody may write"):
        Results(path, "sm_87", strict_json.write_json).check()


# Saves as ``mebp tune`` does, but the process ends in the middle of call ``dies_at``.
WRITER = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from mebp_triton.autotune.log import Record
    from mebp_triton.autotune.results import Results
    from mebp_triton.kernels.configs import PANEL, Problem
    from mebp_triton.kernels.tables import Entry, bucket
    from mebp_triton.system import atomic, strict_json
    kernel, dies_at = sys.argv[2], int(sys.argv[3])
    calls = 0
    def save(path, value):
        global calls
        calls += 1
        if calls == dies_at:
            with atomic.atomic_path(path) as temporary:
                temporary.write_text('{"format"')
                os._exit(9)
        strict_json.write_json(path, value)
    results = Results(Path(sys.argv[1]), "sm_87", save)
    print("ready", flush=True)
    sys.stdin.readline()
    for n in range(7, 19):
        problem = Problem(kernel, 16, 1 << n, 128)
        results.add(Entry(bucket(problem), PANEL, "measured", 1.0, "A device", {}), Record(problem, (), None, {}))
""")


def writer(results, kernel, dies_at=0):
    command = [sys.executable, "-c", WRITER, str(results.path), kernel, str(dies_at)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_that_write_at_once_lose_nothing(results):
    both = [writer(results, kernel) for kernel in ("matmul", "matmul_dx")]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        go(process)
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(results.table()) == 24 and len(results.log().records) == 24


@pytest.mark.parametrize("dies_at", [5, 6])
def test_a_killed_writer_leaves_the_old_files_and_no_lock(results, dies_at):
    """The fifth write is the log of the third problem, the sixth its table."""
    process = writer(results, "matmul", dies_at)
    go(process)
    process.communicate(timeout=60)
    assert process.returncode == 9
    assert len(read_table(results.path, "sm_87")) == 2
    assert len(read_log(log_path(results.path), "sm_87").records) == (2 if dies_at == 5 else 3)
    results.add(entry_of(), Record(PROBLEMS[0], (), None, {}))
    assert entry_of().problem in results.table()


def test_an_empty_log_is_of_its_architecture(results):
    assert results.log() == Log("sm_87") and results.table() == {}
