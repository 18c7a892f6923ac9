"""Bent files, in short: a hundred of the cases of ``tests/torture/bend.py``, and that it sees what is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "torture" / "bend.py"


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
from mebp_triton.store.reader import StoreFile
StoreFile.verify = lambda self, again=False: None
sys.exit(bend.main())
"""


def test_a_planted_fault_is_lost():
    """The same script over a package that compares no checksum of weights."""
    done = subprocess.run([sys.executable, "-c", PLANTED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "another result, without a word" in [case["why"] for case in json.loads(done.stdout)["lost_cases"]]


COMPARED = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import bend
from forked import Ended
given = json.loads(sys.stdin.read())

def result(answer, row):
    Path("metrics.jsonl").write_text(json.dumps(row))
    ended = Ended(0, "", json.dumps(answer), "", 0, 0.0)
    return bend.result(ended, Path.cwd(), [Path("metrics.jsonl").absolute()])

seen = [result(*one) for one in given]
print(json.dumps([one == seen[0] for one in seen]))
"""
PLAN = {
    "planned_peak_bytes": 9,
    "moment": "loss",
    "components": {"framework": 5, "activations": 4},
    "host": [{"moment": "loss", "total_bytes": 9, "components": {"framework": 5, "activations": 4}}],
    "settings": {"per_device_train_batch_size": 1, "device": "cpu"},
}
ROW = {"step": 0, "loss": 2.5, "seconds": 0.1, "peak_rss_bytes": 7}


def changed(value, **changes):
    """A copy of JSON with other values at these keys, wherever they are."""
    if isinstance(value, dict):
        return {key: changes[key] if key in changes else changed(item, **changes) for key, item in value.items()}
    return [changed(item, **changes) for item in value] if isinstance(value, list) else value


def test_what_is_compared(tmp_path):
    """All of an answer and of the lines of steps, but times and what is measured."""
    given = [
        (PLAN, ROW),
        (changed(PLAN, framework=6, total_bytes=10, planned_peak_bytes=10), changed(ROW, seconds=3, peak_rss_bytes=8)),
        (changed(PLAN, activations=5), ROW),
        (changed(PLAN, per_device_train_batch_size=2), ROW),
        (changed(PLAN, device="cuda"), ROW),
        (changed(PLAN, moment="embedding"), ROW),
        (PLAN, changed(ROW, loss=2.25)),
        (PLAN, changed(ROW, step=1)),
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMPARED],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True] + [False] * 6


def test_nothing_tried_is_an_error():
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
         "import results; sys.exit(results.finish({'tried': 0, 'lost': 0}, None))"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == "nothing was tried\n"
