"""One small world that the scripts and tests of this folder share, and the scripts in a process of their own."""

import json
from pathlib import Path

import pytest
import ranks

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Models, stores, adapters, a run, data and tables, as ``world.py`` makes them; no test changes them."""
    root = tmp_path_factory.mktemp("torture")
    made = ranks.run_script(HERE / "world.py", [root / "world"], root / "log")
    assert made.code == 0, made.err
    return root / "world"


@pytest.fixture
def torture(world, tmp_path):
    """Runs a script over the shared world; returns how it ended, and the summary that it wrote."""

    def run(name, *options):
        output = tmp_path / "summary.json"
        ended = ranks.run_script(HERE / name, [*options, f"--world={world}", f"--output={output}"], tmp_path / "log")
        assert output.exists(), ended.err[-3000:]
        return ended, json.loads(output.read_text())

    return run


@pytest.fixture
def scripts(monkeypatch):
    """The scripts can be imported, as by a script that lies beside them."""
    monkeypatch.syspath_prepend(str(HERE))
