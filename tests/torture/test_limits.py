"""Full disks and limits, in short: some points of ``tests/torture/limits.py``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "torture" / "limits.py"


def run(*options):
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=500, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("limits", "least"),
    [("file-size", 20), ("operations", 8)],
)
def test_nothing_is_lost(limits, least):
    commands = "quantize,train --resume,merge,tune" if limits == "file-size" else "quantize,train --resume"
    found = run(f"--limits={limits}", "--steps=6", "--every=40", f"--commands={commands}")
    assert found["lost_points"] == []
    assert found["tried"] >= least and found["refused"] >= least // 2
