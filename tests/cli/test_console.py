"""What commands print: messages and bars to standard error, answers to standard output."""

import argparse
import io
import json

import pytest
from rich.console import Console

from mebp_triton.cli import console


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")


def test_a_message_is_printed_as_it_is(capsys):
    message = "[red]/a/long/path/with spaces[/red] " + "and many more words " * 5 + "12"
    console.say(message)
    assert capsys.readouterr() == ("", message + "\n")


def test_a_quiet_console_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(console.console(), "quiet", True)
    console.say("nothing")
    with console.progress_bar("quantizing") as update:
        update(1, 2)
    assert capsys.readouterr() == ("", "")


def test_an_answer_is_a_table_or_json(capsys):
    value = {"a": 1, "b": None}
    table = console.two_columns("a [bold]title", {"the path": "/a/[b]/c", "number": 3})
    console.answer(argparse.Namespace(json=True), value, table)
    out, err = capsys.readouterr()
    assert json.loads(out) == value and not err
    console.answer(argparse.Namespace(json=False), value, table)
    out, err = capsys.readouterr()
    assert "a [bold]title" in out and "/a/[b]/c" in out and "number" in out and not err


def test_rows_for_people():
    summary = {"peak_rss_bytes": 3 << 19, "loss_after": 1.23456789, "loss_before": None, "steps": 3, "backend": "panel"}
    assert console.readable(summary) == {
        "peak rss": "1.5 MiB",
        "loss after": "1.235",
        "steps": "3",
        "backend": "panel",
    }


@pytest.fixture
def terminal(monkeypatch):
    """A terminal in place of standard error: what it was sent."""
    sent = io.StringIO()
    monkeypatch.setattr(console, "console", lambda: Console(file=sent, force_terminal=True, width=100))
    return sent


def test_bars_of_several_tasks(terminal):
    with console.progress_bar("training") as update:
        assert terminal.getvalue() == "", "nothing before the first update"
        update(1, 3, "loss 1.5")
        update(2, 2, task="evaluating")
        update(3, 3, "loss 0.5")
    text = terminal.getvalue()
    for part in ("training", "3/3", "loss 0.5", "evaluating", "2/2"):
        assert part in text


@pytest.mark.parametrize(("error", "stays"), [(ValueError, False), (RuntimeError, True)])
def test_a_bar_that_a_mistake_ended_is_removed(terminal, error, stays):
    with pytest.raises(error), console.progress_bar("training") as update:
        update(1, 3)
        raise error
    text = terminal.getvalue()
    assert text.rstrip().endswith("\x1b[2K") is not stays, repr(text)
    assert "\x1b[?25h" in text, "the cursor is shown again"


def test_a_mistake_leaves_nothing_of_a_bar_in_a_file(monkeypatch):
    sent = io.StringIO()
    monkeypatch.setattr(console, "console", lambda: Console(file=sent))
    with pytest.raises(ValueError), console.progress_bar("training") as update:
        update(1, 3)
        raise ValueError
    assert sent.getvalue() == ""


def test_transformers_is_silenced():
    import transformers

    transformers.logging.set_verbosity_info()
    transformers.logging.enable_progress_bar()
    console.silence_transformers()
    assert transformers.logging.get_verbosity() == transformers.logging.ERROR
    assert not transformers.logging.is_progress_bar_enabled()
