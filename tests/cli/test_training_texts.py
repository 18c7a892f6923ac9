"""A run keeps the date that its chat template wrote first, however late it is resumed."""

import json
import signal
import time

import pytest
from commands import QUICK, answer, before_step, put, record, tell

from mebp_triton.cli import training_run
from mebp_triton.cli.training_texts import begun_at, begun_with
from mebp_triton.system import strict_json

# As many words as the day of the month: the tokenizer knows no numbers.
DATED = "{{ 'moon ' * strftime_now('%d') | int }}{% for m in messages %}{{ m.content + ' . ' }}{% endfor %}"


@pytest.fixture
def zone(monkeypatch):
    """Sets the time zone. At any moment it is another day at GMT+12 (which is west) than at GMT-14."""

    def setting(name):
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield setting
    monkeypatch.undo()
    time.tzset()


def test_a_run_resumed_on_another_day(mebp, world, tmp_path, zone, monkeypatch):
    turns = [{"role": role, "content": "the cat sees"} for role in ("user", "assistant")]
    put(tmp_path, "chats.jsonl", json.dumps({"messages": turns}) + "\n")
    put(tmp_path, "dated.jinja", DATED)
    run, files = tmp_path / "run", [f"--{name}-file={tmp_path / 'chats.jsonl'}" for name in ("train", "validation")]
    flags = [*QUICK, f"--chat-template={tmp_path / 'dated.jinja'}", "--max-length=64", "--json"]
    command = ["train", world / "store", *files, f"--output-dir={run}", *flags]
    zone("Etc/GMT+12")
    with monkeypatch.context() as patch:
        before_step(patch, 1, lambda: tell(signal.SIGTERM))
        code, _, err = mebp(*command)
    line = f"the chat template writes the date: {time.strftime('%Y-%m-%d')}, when the run began"
    assert code == 143 and line in err, err
    began = json.loads((run / "checkpoint/state.json").read_text())["began"]
    zone("Etc/GMT-14")
    assert time.strftime("%Y-%m-%d") != began[:10]
    with monkeypatch.context() as patch:  # a checkpoint of an older version does not know when its run began
        patch.setattr(training_run, "begun_at", lambda checkpoint: begun_at(None))
        code, _, err = mebp(*command, "--resume")
        assert code == 2 and "training data changed" in err and "a new run goes on by --adapter" in err, err
    others = [files[0], f"--output-dir={tmp_path / 'other'}", f"--adapter={run}", *flags]
    answer(mebp("train", world / "store", *others))
    code, _, err = mebp(*command, "--resume")
    assert code == 0 and line in err, err
    assert json.loads((run / "checkpoint/state.json").read_text())["began"] == began
    assert record(run)["steps"] == 3


def test_a_template_without_the_date_says_nothing_of_it(mebp, world, tmp_path):
    turns = [{"role": role, "content": "the cat sees"} for role in ("user", "assistant")]
    put(tmp_path, "chats.jsonl", json.dumps({"messages": turns}) + "\n")
    arguments = [f"--train-file={tmp_path / 'chats.jsonl'}", f"--output-dir={tmp_path / 'run'}", *QUICK]
    code, _, err = mebp("train", world / "store", *arguments)
    assert code == 0 and "the date" not in err, err


@pytest.mark.parametrize(("config", "joined"), [({}, False), ({"join_micro_batches": True}, True)])
def test_what_orders_the_sums_of_a_run_is_as_it_was_begun_with(tmp_path, config, joined):
    """An older version joined no micro-batches, and did not say so."""
    strict_json.write_json(tmp_path / "state.json", strict_json.sealed({"config": {"mlp_chunk_tokens": 64} | config}))
    assert begun_with(tmp_path) == {"mlp_chunk_tokens": 64, "join_micro_batches": joined}
