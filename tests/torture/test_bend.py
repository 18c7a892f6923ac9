"""Bent files, in short: a hundred of the cases of ``bench/torture/bend.py``, and that it sees what is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "torture" / "bend.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cases = tmp_path_factory.mktemp("bend") / "cases.jsonl"
    kinds = "store,adapter,run,GGUF file,tuned table,data pairs.jsonl,settings"
    options = ["--count=100", "--process=1000", "--workers=2", f"--kinds={kinds}", f"--cases={cases}", "--seed=3"]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=500, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), [json.loads(line) for line in cases.read_text().splitlines()]


def test_nothing_is_lost(found):
    summary, _ = found
    assert summary["lost_cases"] == []
    assert summary["tried"] == 100 and summary["refused"] > 60


def test_what_carries_checksums_is_refused_or_harmless(found):
    _, cases = found
    sealed = [case for case in cases if case["kind"] in ("store", "adapter", "run")]
    assert len(sealed) > 40
    for case in sealed:
        forged, record = case["mutation"].startswith("forged"), case["file"] == "metrics.jsonl"
        assert case["outcome"] in ("refused", "harmless") or forged or record or case["outcome"] == "warned", case


PLANTED = f"""
import sys
sys.argv = ["bend.py", "--count=12", "--process=1000", "--seed=1", "--kinds=store"]
sys.path.insert(0, {str(SCRIPT.parent)!r})
import bend
from mebp_triton.stores.format import StoreFile
StoreFile.verify = lambda self, again=False: None
sys.exit(bend.main())
"""


def test_a_planted_fault_is_lost():
    """The same script over a package that compares no checksum of weights."""
    done = subprocess.run([sys.executable, "-c", PLANTED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "another result, without a word" in [case["why"] for case in json.loads(done.stdout)["lost_cases"]]
