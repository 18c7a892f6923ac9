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
    options = ["--count=150", "--process=1000", "--workers=2", f"--kinds={kinds}", f"--cases={cases}", "--seed=3"]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=1800, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), [json.loads(line) for line in cases.read_text().splitlines()]


def test_nothing_is_lost(found):
    summary, _ = found
    assert summary["lost_cases"] == []
    assert summary["tried"] == 150 and summary["refused"] > 90


def test_what_carries_checksums_is_refused_or_harmless(found):
    _, cases = found
    sealed = [case for case in cases if case["kind"] in ("store", "adapter", "run")]
    assert len(sealed) > 60
    for case in sealed:
        forged, record = case["mutation"].startswith("forged"), case["file"] == "metrics.jsonl"
        assert case["outcome"] in ("refused", "harmless") or forged or record or case["outcome"] == "warned", case


FAULTS = {
    "a checksum that is not compared": (
        "mebp_triton.stores.format.StoreFile.verify",
        "lambda self, again=False: None",
        "another result, without a word",
    ),
    "a seal that is not compared": (
        "mebp_triton.files.sealed",
        "lambda value: {**value, 'seal': None}",
        "another result, without a word",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_lost(name, tmp_path):
    """The same script over a package with a fault in it."""
    target, replacement, why = FAULTS[name]
    module, _, attribute = target.rpartition(".")
    owner, _, kind = module.rpartition(".")
    place = module if not kind[0].isupper() else owner
    program = (
        f"import sys; sys.argv = ['bend.py', '--count=60', '--process=1000', '--seed=1', '--kinds=store,run']\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"import bend, importlib\n"
        f"owner = importlib.import_module({place!r})\n"
        f"owner = getattr(owner, {kind!r}) if {kind!r}[0].isupper() else owner\n"
        f"setattr(owner, {attribute!r}, {replacement})\n"
        f"sys.exit(bend.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert why in [case["why"] for case in json.loads(done.stdout)["lost_cases"]]
