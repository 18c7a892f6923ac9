"""Messages as people have them: roles, keys and contents of other projects give the rows of plain messages."""

import json

import pytest
from texts import ANSWER, QUESTION, TALK, byte_bpe, encode, rows, trained_text

from mebp_triton.data.loading import load_data
from mebp_triton.data.masking import Masking
from mebp_triton.data.messages import MASKED_KEYS, TRAINED_KEYS

ASSISTANT = Masking(assistant_only_loss=True)
SPOKEN = [{"from": who, "value": m["content"]} for who, m in zip(("human", "gpt") * 2, TALK[1:], strict=True)]
NAMED = [
    {"role": who, "content": m["content"]}
    for who, m in zip(("system", "human", "bot", "User", "gpt"), TALK, strict=True)
]
PARTS = [
    {
        "role": m["role"],
        "content": [{"type": "text", "text": m["content"][:3]}, {"type": "text", "text": m["content"][3:]}],
    }
    for m in TALK
]
SYSTEM = {"system": "Be short."}


@pytest.mark.parametrize(
    "row, converted",
    [
        ({"conversations": [{"from": "system", "value": "Be short."}, *SPOKEN]}, 1),
        ({"conversations": SPOKEN} | SYSTEM, 1),
        ({"conversations": TALK} | SYSTEM, 1),
        ({"messages": SPOKEN} | SYSTEM, 1),
        ({"messages": NAMED}, 1),
        ({"messages": PARTS}, 0),
        ({"messages": TALK[1:]} | SYSTEM, 0),
        ({"messages": json.dumps(TALK)}, 0),
        ({"messages": [message | {"weight": None, "name": None} for message in TALK]}, 0),
    ],
)
def test_other_forms_give_the_rows_of_messages(tokenizer, write, row, converted):
    wanted = rows(load_data(write("m.jsonl", [{"messages": TALK}]), tokenizer, 999, masking=ASSISTANT))
    data = load_data(write("x.jsonl", [row]), tokenizer, 999, masking=ASSISTANT)
    assert rows(data) == wanted and data.report.unused_keys == {}
    assert data.report.converted_rows == converted and ("1 converted" in data.report.describe()) == converted


@pytest.mark.parametrize(
    "row, message",
    [
        ({"conversations": {}}, "'conversations' must be a list of messages, not empty, got dict"),
        (
            {"conversations": ["hi"]},
            "a message of 'conversations' must be an object with 'role' and 'content', got str",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            "is from 'function_call'; known are user, hum",
        ),
        ({"conversations": [{"from": "human"}]}, "the 'content' of a message of 'conversations' must be a string"),
        ({"messages": QUESTION, "tools": "[{"}, "'tools' is a string that is not JSON"),
        ({"messages": "[{'role': 'user'}]"}, "'messages' is a string that is not JSON"),
        ({"messages": TALK, "system": "Be long."}, "'system' of the row and its system message differ"),
        ({"messages": QUESTION, "system": 5}, "'system' must be a string, got int 5"),
        ({"messages": QUESTION, "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object, got list"),
        ({"messages": QUESTION, "chat_template_kwargs": {"tools": 1}}, "has 'tools', which is set by the training"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "has a part of type image_url; only text is trained on",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "has a part of type str 'a'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "training": False}]}]},
            "a part of a message of 'messages' says that it is not trained; a message is trained as a whole",
        ),
    ],
)
def test_broken_messages(tokenizer, write, row, message):
    with pytest.raises(ValueError, match=f"x.jsonl:1: .*{message}"):
        load_data(write("x.jsonl", [row]), tokenizer, 99)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_message_of_calls_alone_has_an_empty_content_for_the_template(write, content):
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    row = {"messages": [{"role": "assistant", "tool_calls": calls} | content, {"role": "user", "content": "two"}]}
    tokenizer = byte_bpe()
    data = load_data(write("x.jsonl", [row]), tokenizer, 999)
    ((ids, _),) = rows(data)
    assert ids == encode(tokenizer, "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n")
    assert data.report.unused_keys == {"messages[].tool_calls": 1}, "this template writes no calls"


CALLING = """{% for m in messages %}{% for c in m.tool_calls or [] %}{{ (c.function or c).arguments ARGUMENTS }}
{%- endfor %}{% endfor %}"""


@pytest.mark.parametrize("arguments", ["| tojson", "+ ''"], ids=["objects", "strings"])
@pytest.mark.parametrize("wrap", [lambda call: {"function": call}, lambda call: call], ids=["function", "bare"])
def test_arguments_of_calls_are_given_in_the_form_that_the_template_takes(write, arguments, wrap):
    tokenizer = byte_bpe(CALLING.replace("ARGUMENTS", arguments))
    for given in ('{"a": 2}', {"a": 2}):
        row = {"messages": [{"role": "assistant", "tool_calls": [wrap({"name": "f", "arguments": given})]}]}
        ((ids, _),) = rows(load_data(write("x.jsonl", [row]), tokenizer, 99))
        assert tokenizer.decode(ids) == '{"a": 2}'


# --- what a message, or a row, says about its own loss --------------------------------------------------------------


@pytest.mark.parametrize("key", TRAINED_KEYS + MASKED_KEYS)
@pytest.mark.parametrize("form", [bool, int, float, str, lambda value: str(int(value))])
@pytest.mark.parametrize("where", ["messages", "conversations"])
def test_each_key_in_each_form(write, key, form, where):
    tokenizer = byte_bpe(eos_token="<|im_end|>")
    off, on = (form(value is (key in TRAINED_KEYS)) for value in (False, True))
    talk = [TALK[1], TALK[2] | {key: off}, TALK[3], TALK[4] | {key: on}]
    if where == "conversations":
        talk = [spoken | {name: m[name] for name in m if name == key} for spoken, m in zip(SPOKEN, talk, strict=True)]
    data = load_data(write("x.jsonl", [{where: talk}]), tokenizer, 999, masking=ASSISTANT)
    ((_, labels),) = rows(data)
    assert trained_text(tokenizer, labels) == ["Five.<|im_end|>\n"]
    assert data.report.masked_messages == 1 and data.report.unused_keys == {}


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"weight": 0.5}, "'weight' of message 1 of 'messages' is 0.5; only 0 and 1"),
        ({"loss": "no"}, "'loss' of message 1 of 'messages' is 'no'"),
        ({"loss_mask": [1, 0]}, "'loss_mask' of message 1"),
        ({"weight": float("nan")}, "'weight' of message 1 of 'messages' is nan"),
        ({"weight": 1, "masked": True}, "'weight' and 'masked' of message 1 of 'messages' contradict each other"),
    ],
)
def test_a_key_that_cannot_be_followed_is_refused(tokenizer, write, keys, message):
    with pytest.raises(ValueError, match=f"x.jsonl:1: .*{message}"):
        load_data(write("x.jsonl", [{"messages": [ANSWER[0] | keys]}]), tokenizer, 99)


def test_a_rows_system_moves_no_weight_to_another_message(tokenizer, write):
    talk = [*TALK[1:2], TALK[2] | {"weight": 0}, *TALK[3:]]
    wanted = rows(load_data(write("m.jsonl", [{"messages": [TALK[0], *talk]}]), tokenizer, 999))
    assert rows(load_data(write("x.jsonl", [{"messages": talk} | SYSTEM]), tokenizer, 999)) == wanted
    pair = {"prompt": TALK[1:4], "completion": TALK[4:]}  # it comes before the prompt, and not again before the answer
    wanted = rows(load_data(write("m.jsonl", [pair | {"prompt": TALK[:4]}]), tokenizer, 999))
    assert rows(load_data(write("x.jsonl", [pair | SYSTEM]), tokenizer, 999)) == wanted


def test_rows_of_weight_0_are_dropped(tokenizer, write):
    kinds = [{"messages": TALK}, {"text": "The cat sat"}, {"prompt": "two", "completion": " four"}]
    lines = [row | {"weight": weight} for row in kinds for weight in (0, "False", 1, "0.0", "big", None)]
    data = load_data(write("x.jsonl", lines), tokenizer, 99)
    assert rows(data) == rows(load_data(write("y.jsonl", [row for row in kinds for _ in range(3)]), tokenizer, 99))
    assert data.report.dropped_rows == 9 and data.report.unused_keys == {"weight": 3}
    with pytest.raises(ValueError, match="x.jsonl:1: 'weight' of the row is 0.3; only 0 and 1"):
        load_data(write("x.jsonl", [kinds[1] | {"weight": 0.3}]), tokenizer, 99)


def test_keys_without_effect_are_counted(tokenizer, write):
    lines = [{"messages": [message | {"mask": 1, "id": "a"} for message in TALK], "source": "b", "tools": [{}]}] * 2
    lines += [
        {"text": "The cat sat", "system": "c", "label": False},
        {"messages": [QUESTION[0] | {"train": True}, *ANSWER]},
    ]
    lines += [{"messages": QUESTION + ANSWER, "chat_template_kwargs": {"enable_thinking": False}}]
    lines += [{"instruction": "a", "output": "b", "input": "c", "id": 3, "loss": 0.3}]
    report = load_data(write("x.jsonl", lines), tokenizer, 999).report
    counts = {"messages[].mask": 10, "messages[].id": 10, "source": 2, "tools": 2, "system": 1, "label": 1}
    assert report.unused_keys == counts | {"chat_template_kwargs.enable_thinking": 1, "id": 1, "loss": 1}
    assert "without effect: messages[].mask (10), messages[].id (10), " in report.describe()
    chats = [line for line in lines if "messages" in line]
    report = load_data(write("x.jsonl", chats), tokenizer, 999, masking=ASSISTANT).report
    assert report.unused_keys["a weight on a message of 'user'"] == 1


def test_only_so_many_keys_are_named(tokenizer, write):
    data = load_data(write("x.jsonl", [{"text": "The cat sat"} | {f"k{n}": 1 for n in range(300)}]), tokenizer, 99)
    assert len(data.report.unused_keys) == 201 and data.report.unused_keys["others"] == 100
    assert data.report.describe().endswith("and 189 more keys")


BOTH = {"prompt": QUESTION, "chosen": ANSWER, "rejected": ANSWER}
PART = {"type": "text", "text": "four."}


@pytest.mark.parametrize(
    "refused, named, mended",
    [
        (BOTH, "rename 'chosen' to 'completion' .beside 'prompt'.", {"prompt": QUESTION, "completion": ANSWER}),
        ({"chosen": TALK, "rejected": TALK}, "or to 'messages'", {"messages": TALK, "rejected": TALK}),
        ({"messages": TALK} | {"system": "Be long."}, "keep one of them", {"messages": TALK[1:], "system": "Be long."}),
        ({"messages": QUESTION + ANSWER, "weight": 0.5}, "or remove the key", {"messages": QUESTION + ANSWER}),
        (
            {"messages": [*QUESTION, {"role": "assistant", "content": [PART | {"weight": 0}]}, *TALK[3:]]},
            "say so beside its 'content'",
            {"messages": [*QUESTION, {"role": "assistant", "content": [PART], "weight": 0}, *TALK[3:]]},
        ),
        (
            {"conversations": [{"from": "critic", "value": "a"}, *SPOKEN]},
            "use 'role' and 'content'",
            {"conversations": [{"role": "critic", "content": "a"}, *TALK[1:]]},
        ),
    ],
)
def test_the_way_out_that_a_message_names(tokenizer, write, refused, named, mended):
    with pytest.raises(ValueError, match=f"x.jsonl:1: .*{named}"):
        load_data(write("x.jsonl", [refused]), tokenizer, 999)
    assert len(load_data(write("y.jsonl", [mended]), tokenizer, 999)) == 1
