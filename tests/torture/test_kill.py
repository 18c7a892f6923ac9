"""The short form of ``kill.py``: a few points of some commands, and that it notices what is lost."""


def test_what_is_killed_goes_on_to_the_same_end(torture):
    commands = ("merge into a store", "quantize, then", "blocks selected", "tune")
    ended, summary = torture("kill.py", "--points=2", "--moments=0", *(f"--only={name}" for name in commands))
    assert ended.code == 0, ended.err[-2000:]
    assert summary["tried"] == summary["survived"] == 8 and summary["lost"] == 0
    for found in summary["commands"].values():
        assert found["operation"] == found["half"] == 1 and found["file_operations"] > 20


def test_a_planted_fault_is_lost(torture):
    """Commands that remove nothing leave what the killed one had begun."""
    ended, summary = torture("kill.py", "--points=3", "--moments=0", "--only=merge into a store", "--planted")
    assert ended.code == 1 and summary["lost"] > 0
    (found,) = summary["commands"].values()
    assert any("left .mebp-tmp-" in line for lost in found["lost"] for line in lost["wrong"])
