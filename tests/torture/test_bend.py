"""The short form of ``bend.py``: all mutations and commands of some kinds, and that it notices what is lost."""

import json

import pytest

KINDS = (
    "store",
    "a store cut short in use",
    "8-bit store",
    "adapter",
    "run",
    "GGUF file",
    "tuned table",
    "data pairs.jsonl",
    "settings",
)


@pytest.fixture
def bend(scripts):
    import bend

    return bend


# Kinds of files that carry checksums: damage in them must be noticed.
CARRY_CHECKSUMS = ("store", "8-bit store", "run", "adapter")


def test_bent_files_are_refused_or_harmless(torture, bend, world, tmp_path):
    cases = tmp_path / "cases.jsonl"
    options = ("--in-turn", "--count=60", "--process=1000", "--workers=1", f"--kinds={','.join(KINDS)}")
    ended, summary = torture("bend.py", *options, f"--cases={cases}")
    assert summary["lost_cases"] == [] and ended.code == 0, ended.err[-2000:]
    assert summary["tried"] == 60 and summary["refused"] > 36
    possible = {one.name for kind in KINDS for one in bend.MUTATIONS if bend._takes_any(world, kind, one)}
    assert summary["by_mutation"].keys() == possible | {"cut after a check"}
    assert summary["by_command"].keys() == {name for kind in KINDS for name in bend.SUBJECTS[kind].commands}
    sealed = [case for case in map(json.loads, cases.read_text().splitlines()) if case["kind"] in CARRY_CHECKSUMS]
    assert len(sealed) > 20
    for case in sealed:
        forged, record = case["mutation"].startswith("forged"), case["file"] == "metrics.jsonl"
        assert case["outcome"] in ("refused", "harmless") or forged or record or case["outcome"] == "warned", case


def test_a_planted_fault_is_lost(torture):
    """Commands that compare no checksum of weights answer something else, without a word."""
    options = ("--count=12", "--process=1000", "--workers=1", "--seed=4", "--kinds=store")
    ended, summary = torture("bend.py", *options, "--planted")
    assert ended.code == 1, ended.err[-2000:]
    assert "another result, without a word" in [case["why"] for case in summary["lost_cases"]]


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


def test_what_is_compared(bend, tmp_path):
    """All of an answer and of the lines of steps, but times and what is measured."""

    def result(answer, row):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
        ended = bend.Ended(0, "", json.dumps(answer), "", 0, 0.0)
        return bend.result(ended, tmp_path, [tmp_path / "metrics.jsonl"])

    found = [
        result(PLAN, ROW),
        result(
            changed(PLAN, framework=6, total_bytes=10, planned_peak_bytes=10),
            changed(ROW, seconds=3, peak_rss_bytes=8),
        ),
        result(changed(PLAN, activations=5), ROW),
        result(changed(PLAN, per_device_train_batch_size=2), ROW),
        result(changed(PLAN, device="cuda"), ROW),
        result(changed(PLAN, moment="embedding"), ROW),
        result(PLAN, changed(ROW, loss=2.25)),
        result(PLAN, changed(ROW, step=1)),
    ]
    assert [one == found[0] for one in found] == [True, True] + [False] * 6


def test_nothing_tried_is_an_error(bend, capsys):
    assert bend.finish({"tried": 0, "lost": 0}, None) == 1
    assert capsys.readouterr().err == "nothing was tried\n"
