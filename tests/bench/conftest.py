"""The rehearsal of the GPU suite, which runs once for all tests of its results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory):
    """The path of the rehearsal's JSON, its value, and how the process ended."""
    output = tmp_path_factory.mktemp("results") / "rehearsal.json"
    command = [sys.executable, BENCH / "gpu_suite.py", "--dry-run", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert output.exists(), done.stderr[-2000:]
    return output, json.loads(output.read_text()), done


@pytest.fixture
def bench_path(monkeypatch):
    """bench/, on the import path, as for a script that lies there."""
    monkeypatch.syspath_prepend(str(BENCH))
    return BENCH
