"""Conversations: what the template writes, and which of its turns are trained."""

import json

import pytest
from texts import ANSWER, CHATML, QUESTION, TALK, byte_bpe, encode, rows, trained_text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mebp_triton.data.loading import load_data
from mebp_triton.data.masking import Masking

# The same text as CHATML's, with the assistant's turns marked.
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}",
)
ASSISTANT = Masking(assistant_only_loss=True)


def test_messages_go_through_the_template_and_are_all_trained(tokenizer, write):
    text = "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\nfour.<|im_end|>\n"
    data = load_data(write("x.jsonl", [{"messages": QUESTION + ANSWER}]), tokenizer, 99)
    assert rows(data) == [(encode(tokenizer, text),) * 2]  # nothing appended: the template closes each message


def test_prompt_and_completion_of_messages(tokenizer, write):
    head = encode(tokenizer, "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n")
    rest = encode(tokenizer, "four.<|im_end|>\n")
    data = load_data(write("x.jsonl", [{"prompt": QUESTION, "completion": ANSWER}]), tokenizer, 99)
    assert rows(data) == [(head + rest, [-100] * len(head) + rest)]


def test_template_whose_answer_header_differs(write):
    """Templates of reasoning models open the answer with a thought that a given answer does not have."""
    template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    head = encode(tokenizer, "<|im_start|>user\nWhat is two plus two?<|im_end|>\n")
    data = load_data(write("x.jsonl", [{"prompt": QUESTION, "completion": ANSWER}]), tokenizer, 99)
    assert data[0].labels.tolist().count(-100) == len(head)

    counting = byte_bpe("{{ messages | length }}" + CHATML, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="x.jsonl:1: the chat template writes 'prompt' differently"):
        load_data(write("x.jsonl", [{"prompt": QUESTION, "completion": ANSWER}]), counting, 99)


def test_tools_reach_the_template(write):
    tokenizer = byte_bpe("{{ tools[0]['name'] if tools else 'none' }} " + CHATML, eos_token="<|im_end|>")
    lines = [{"messages": QUESTION}, {"messages": QUESTION, "tools": [{"name": "plus", "parameters": {}}]}]
    data = load_data(write("x.jsonl", lines), tokenizer, 99)
    assert [tokenizer.decode(ids)[:5] for ids, _ in rows(data)] == ["none ", "plus "]


def test_tools_may_be_json_in_a_string(write):
    tokenizer = byte_bpe("{{ tools[0]['name'] if tools else 'none' }} " + CHATML, eos_token="<|im_end|>")
    tools = [{"name": "plus", "parameters": {}}]
    forms = [{"messages": QUESTION, "tools": tools}, {"messages": QUESTION, "tools": json.dumps(tools)}]
    first, second = rows(load_data(write("x.jsonl", forms), tokenizer, 99))
    assert first == second
    assert rows(load_data(write("y.jsonl", [{"messages": QUESTION, "tools": ""}]), tokenizer, 99)) != [first]


def test_chat_template_missing_or_refusing(bare, write):
    for row in ({"messages": QUESTION}, {"prompt": QUESTION, "completion": ANSWER}):
        with pytest.raises(ValueError, match="x.jsonl:1: chat messages, but the tokenizer has no chat template"):
            load_data(write("x.jsonl", [row]), bare, 99)
    strict = byte_bpe("{{ raise_exception('Roles must\nalternate') }}")
    with pytest.raises(ValueError, match=r"x.jsonl:1: the chat template refuses .*\(Roles must alternate\)"):
        load_data(write("x.jsonl", [{"messages": QUESTION}]), strict, 99)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_message_of_calls_alone_has_an_empty_content_for_the_template(write, content):
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    row = {"messages": [{"role": "assistant", "tool_calls": calls} | content, {"role": "user", "content": "two"}]}
    tokenizer = byte_bpe()
    ((ids, _),) = rows(load_data(write("x.jsonl", [row]), tokenizer, 999))
    whole = "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
    assert ids == encode(tokenizer, whole)


# --- the assistant's turns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
def test_the_assistants_turns_alone_are_trained(write, template):
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    path = write("x.jsonl", [{"messages": TALK}])
    ((whole, everything),) = rows(load_data(path, tokenizer, 999))
    ((ids, labels),) = rows(load_data(path, tokenizer, 999, masking=ASSISTANT))
    assert ids == whole == everything
    assert trained_text(tokenizer, labels) == ["four.<|im_end|>\n", "Five.<|im_end|>\n"]
    assert [label for label in labels if label != -100] == encode(tokenizer, "four.<|im_end|>\nFive.<|im_end|>\n")


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
@pytest.mark.parametrize(
    "completion_only, stretches",
    [(None, ["Five.<|im_end|>\n"]), (True, ["Five.<|im_end|>\n"]), (False, ["four.<|im_end|>\n", "Five.<|im_end|>\n"])],
)
def test_a_prompts_own_assistant_turns(write, template, completion_only, stretches):
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    path = write("x.jsonl", [{"prompt": TALK[:2] + ANSWER, "completion": TALK[3:]}])
    masking = Masking(completion_only, assistant_only_loss=True)
    ((_, labels),) = rows(load_data(path, tokenizer, 999, masking=masking))
    assert trained_text(tokenizer, labels) == stretches
    ((_, labels),) = rows(load_data(path, tokenizer, 999, masking=Masking(completion_only)))
    text = tokenizer.decode([label for label in labels if label != -100])
    assert text.endswith("Five.<|im_end|>\n") and ("Be short" in text) == (completion_only is False)


HEADED = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nassistant<|im_end|>\n' }}{% endif %}" + CHATML


@pytest.mark.parametrize("template", [CHATML, HEADED, MARKED, CHATML.split("{% if add_gen")[0]], ids=range(4))
def test_an_answer_that_begins_a_conversation_is_trained_without_its_header(write, template):
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    talk = [{"role": "assistant", "content": "four."}, *TALK[1:2], {"role": "assistant", "content": "Five."}]
    ((_, labels),) = rows(load_data(write("x.jsonl", [{"messages": talk}]), tokenizer, 999, masking=ASSISTANT))
    found = trained_text(tokenizer, labels)
    assert found[0] == "four.<|im_end|>\n" and found[1].endswith("Five.<|im_end|>\n") and len(found) == 2


def test_a_template_that_closes_the_conversation_with_eos(write):
    """As Phi-3's. The token that closes it is the last turn's."""
    tokenizer = byte_bpe(CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"), eos_token="<|pad|>")
    ((ids, labels),) = rows(load_data(write("x.jsonl", [{"messages": TALK}]), tokenizer, 999, masking=ASSISTANT))
    assert trained_text(tokenizer, labels) == ["four.<|im_end|>\n", "Five.<|im_end|>\n<|pad|>"]


def test_a_template_that_rewrites_earlier_turns_is_an_error_that_names_the_row(write):
    """As Qwen3's: only the last answer has a thought."""
    thinking = CHATML.replace(
        "message['content'] +",
        "('<think>' if loop.last and message.role == 'assistant' else '') + message['content'] +",
    )
    tokenizer = byte_bpe(thinking, eos_token="<|im_end|>")
    with pytest.raises(
        ValueError, match=r"x.jsonl:2: the chat template writes message 3, .*\{% generation %\}"
    ) as error:
        load_data(write("x.jsonl", [{"messages": TALK[:3]}, {"messages": TALK}]), tokenizer, 999, masking=ASSISTANT)
    assert "\n" not in str(error.value)
    ((_, labels),) = rows(load_data(write("x.jsonl", [{"messages": TALK[:3]}]), tokenizer, 999, masking=ASSISTANT))
    assert trained_text(tokenizer, labels) == ["<think>four.<|im_end|>\n"]


def test_a_token_across_the_beginning_of_a_turn_is_cut(write):
    """The header ends in a newline, and so begins the answer: as one text they would be one token."""
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "/": 3, "//": 4}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Punctuation("contiguous")
    template = "{% for m in messages %}{{ m['role'][0].replace('u', 'b') + '/' + m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}a/{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)
    row = {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "/b"}]}
    assert encode(tokenizer, "a//b") == [1, 4, 2]
    ((ids, labels),) = rows(load_data(write("x.jsonl", [row]), tokenizer, 99, masking=ASSISTANT))
    assert ids == [2, 3, 0, 3, 3, 2]  # "b/ba/" as at inference, and then "/b"
    assert labels == [-100, -100, -100, -100, 3, 2]


def test_marks_need_a_fast_tokenizer(write, monkeypatch):
    tokenizer = byte_bpe(MARKED, eos_token="<|im_end|>")
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ValueError, match="x.jsonl:1: .*needs a fast tokenizer"):
        load_data(write("x.jsonl", [{"messages": TALK}]), tokenizer, 99, masking=ASSISTANT)
