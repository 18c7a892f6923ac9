"""``train --chat-template``: a run with another template than the tokenizer's, and what is done with its adapter."""

import json
import shutil
import signal

import pytest
from commands import QUICK, answer, assert_refused, before_step, put, record, tell, without
from runs import sentences, word_tokenizer
from transformers import AutoTokenizer

from mebp_triton.cli.chat_template import use_template
from mebp_triton.cli.inference import load_tokenizer
from mebp_triton.cli.main import main

TEMPLATE = "{% for m in messages %}{{ m.content + ' . ' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ 'and ' }}{% endif %}"
MASKED = ["--assistant-only-loss", "--max-length=24", "--max-eval-windows=2", "--json"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    place = tmp_path_factory.mktemp("chats")
    talk = sentences(8).split(" . ")[:8]
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in talk]
    put(place, "chats.json", json.dumps([{"messages": turn} for turn in turns]))
    put(place, "template.jinja", "\ufeff" + TEMPLATE)
    return place


def command(world, chats, run, *flags):
    files = [f"--{name}-file={chats / 'chats.json'}" for name in ("train", "validation")]
    return ["train", world / "store", *files, f"--output-dir={run}", *QUICK, *MASKED, *flags]


@pytest.fixture(scope="module")
def trained(world, chats):
    arguments = command(world, chats, chats / "run", f"--chat-template={chats / 'template.jinja'}")
    assert main([str(argument) for argument in arguments]) == 0
    return record(chats / "run"), chats / "run" / "adapter"


def test_the_adapter_keeps_the_template_and_every_command_takes_it(mebp, world, chats, tmp_path, trained):
    value, adapter = trained
    assert (adapter / "chat_template.jinja").read_text() == TEMPLATE
    text = [f"--validation-file={chats / 'chats.json'}", *MASKED]
    found = answer(mebp("eval", world / "store", f"--adapter={adapter}", *text))
    assert found["loss"] == value["loss_after"]
    flag = f"--chat-template={chats / 'template.jinja'}"
    assert answer(mebp("eval", world / "store", flag, *text))["loss"] == value["loss_before"]
    assert answer(mebp("eval", world / "store", *text))["loss"] != value["loss_before"]
    assert not (world / "run/adapter/chat_template.jinja").exists()
    for name, flags in (("model", ["--dtype=float32"]), ("store", ["--as-store"])):
        answer(mebp("merge", world / "store", tmp_path / name, f"--adapter={adapter}", *flags, "--json"))
        assert load_tokenizer(tmp_path / name).chat_template == TEMPLATE
    assert answer(mebp("verify", tmp_path / "store", "--json"))
    prompts = ["--chat", "--prompt=the cat sees"], ["--prompt=the cat sees . and"]
    asked, spelled = (
        answer(mebp("generate", world / "store", f"--adapter={adapter}", "--max-new-tokens=4", "--json", *prompt))
        for prompt in prompts
    )
    assert asked["completion"] == spelled["completion"]


def test_a_run_from_the_adapter_takes_it_too(mebp, world, chats, tmp_path, trained):
    value, adapter = trained
    flags = [f"--adapter={adapter.parent}", "--max-steps=1"]
    more = answer(mebp(*command(world, chats, tmp_path / "more", *flags)))
    assert more["loss_before"] == value["loss_after"]
    assert (tmp_path / "more/adapter/chat_template.jinja").read_text() == TEMPLATE


def test_a_resumed_run_needs_no_template_but_its_own(mebp, world, chats, tmp_path, monkeypatch, trained):
    flag, resumed = f"--chat-template={chats / 'template.jinja'}", tmp_path / "resumed"
    with monkeypatch.context() as patch:
        before_step(patch, 1, lambda: tell(signal.SIGTERM))
        code, _, err = mebp(*command(world, chats, resumed, flag))
        assert code == 143, err
    value = answer(mebp(*command(world, chats, resumed, "--resume")))
    assert value["loss_after"] == trained[0]["loss_after"]
    assert record(resumed)["data"] == record(trained[1].parent)["data"]


@pytest.mark.parametrize(
    "content, parts",
    [
        (None, ["chat-template", "x.jinja: no such file; give a file with a template in Jinja"]),
        ("\n", ["x.jinja: is empty"]),
        (b"caf\xe9", ["x.jinja: not UTF-8"]),
        ("{% for m in messages %}\n{{ m.content }", ["x.jinja: no Jinja (line 2:"]),
        ("chatml", ["x.jinja: it writes nothing of what a message says"]),
    ],
)
def test_what_is_no_template_is_refused(mebp, world, chats, tmp_path, content, parts):
    if content is not None:
        put(tmp_path, "x.jinja", content)
    assert_refused(mebp, command(world, chats, tmp_path / "run", f"--chat-template={tmp_path / 'x.jinja'}"), parts)


def test_a_tokenizer_without_a_template_gets_one_as_the_message_says(mebp, world, chats, tmp_path):
    model = without(world, tmp_path, "chat_template*")
    store = tmp_path / "store"
    answer(mebp("quantize", model, store, "--group-size=32", "--json"))
    text = [f"--validation-file={chats / 'chats.json'}", *MASKED]
    for given in (["eval", store, *text], ["train", store, *command(world, chats, tmp_path / "run")[2:]]):
        assert_refused(
            mebp, given, ["has no chat template; name a file with one by --chat-template (of train and eval)"]
        )
        assert answer(mebp(*given, f"--chat-template={chats / 'template.jinja'}"))


def test_a_template_that_wants_other_messages_is_left_to_the_rows():
    tokenizer = word_tokenizer(None)
    use_template(tokenizer, "{{ raise_exception('a system message first') }}", "a file")
    assert "raise_exception" in tokenizer.chat_template


TURNS = "{% for m in messages %}{{ m.role + ' ' + m.content + ' . ' }}{% endfor %}"
AGREES = TURNS + "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
THOUGHT = TURNS + "{% if add_generation_prompt %}{{ 'assistant the moon ' }}{% endif %}"


@pytest.mark.parametrize(
    "template, at_training, at_generation",
    [
        (TURNS, "in 8 chat rows 'assistant', which it writes before answers, counts as", "'assistant', which it"),
        (THOUGHT, "8 of 8 chat rows have no answer behind what", "ends the prompt by 'assistant the moon '"),
        (AGREES, None, None),
    ],
)
def test_a_generation_prompt_that_the_answers_do_not_have(
    mebp, world, chats, tmp_path, template, at_training, at_generation
):
    put(tmp_path, "t.jinja", template)
    code, _, err = mebp(
        *command(world, chats, tmp_path / "run", f"--chat-template={tmp_path / 't.jinja'}", "--max-steps=1")
    )
    assert code == 0 and (at_training in err if at_training else "is wanted" not in err), err
    prompt = ["generate", world / "store", "--prompt=the cat sees", "--chat", "--max-new-tokens=2"]
    code, _, err = mebp(*prompt, f"--adapter={tmp_path / 'run'}")
    assert code == 0 and (at_generation in err if at_generation else "answer" not in err), err


def test_named_templates_without_a_default(mebp, world, chats, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(world / "store", store)
    tokenizer = AutoTokenizer.from_pretrained(store)
    tokenizer.chat_template = {"rag": TEMPLATE, "other": TURNS}
    (store / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(store)
    answer(mebp("verify", store, "--accept-changes", "--json"))
    files = [f"--train-file={chats / 'chats.json'}", f"--output-dir={tmp_path / 'run'}", *QUICK]
    assert_refused(mebp, ["train", store, *files], ["none named default", "--chat-template FILE"], tmp_path / "run")
    ask = ["generate", store, "--chat", "--prompt=the cat", "--max-new-tokens=2"]
    assert_refused(mebp, ask, ["none named default", "--chat-template FILE"])
    code, _, err = mebp("train", store, *files, f"--chat-template={chats / 'template.jinja'}")  # the way that it names
    assert code == 0, err
    assert mebp(*ask, f"--adapter={tmp_path / 'run'}")[0] == 0
