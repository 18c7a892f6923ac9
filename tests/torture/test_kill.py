"""The short form of tests/torture/kill.py: a few points of each command."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tests" / "torture" / "kill.py"


def test_what_is_killed_goes_on_to_the_same_end(tmp_path):
    few = [
        "--points=2",
        "--moments=0",
        "--only=merge into a store",
        "--only=quantize, then",
        "--only=blocks selected",
        "--only=tune",
    ]
    command = [sys.executable, SCRIPT, *few, f"--output={tmp_path / 'kill.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "kill.json").read_text())
    assert summary["points"] == summary["survived"] == 8 and summary["lost"] == 0
    for found in summary["commands"].values():
        assert found["operation"] + found["half"] == found["points"] == 2 and found["file_operations"] > 20
