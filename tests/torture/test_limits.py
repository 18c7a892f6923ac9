"""The short form of ``limits.py``: some limits of some commands, and that it notices what is lost."""


def test_a_file_size_limit_loses_nothing(torture):
    ended, summary = torture(
        "limits.py", "--limits=file-size", "--steps=3", "--commands=quantize,train --resume,merge,tune"
    )
    assert summary["lost_points"] == [] and ended.code == 0, ended.err[-2000:]
    assert summary["tried"] == 12 and summary["refused"] >= 6 and summary["finished"] >= 4


def test_failing_operations_lose_nothing(torture):
    ended, summary = torture(
        "limits.py", "--limits=operations", "--in-turn", "--every=25", "--commands=quantize,train --resume"
    )
    assert summary["lost_points"] == [] and ended.code == 0, ended.err[-2000:]
    assert summary["tried"] >= 8 and summary["refused"] >= 6
    assert summary["by_limit"].keys() == {f"operation fails: {how}" for how in ("EIO", "ENOSPC", "short")}


def test_a_planted_fault_is_lost(torture):
    """A command that removes nothing leaves what it had begun."""
    ended, summary = torture("limits.py", "--limits=file-size", "--steps=2", "--commands=merge --as-store", "--planted")
    assert ended.code == 1 and "left .mebp-tmp-" in summary["lost_points"][0]["why"]
