"""Conversations: what the template writes, and which of its turns are trained."""

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
    """Templates of reasoning models open the answer with a thought that a given answer does not have.

    What they have in common is masked, and the rows are counted.
    """
    template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    for row, masking in (
        ({"prompt": QUESTION, "completion": ANSWER}, None),
        ({"messages": QUESTION + ANSWER}, ASSISTANT),
    ):
        data = load_data(write("x.jsonl", [row, row]), tokenizer, 99, masking=masking)
        assert trained_text(tokenizer, data[0].labels.tolist()) == ["four.<|im_end|>\n"]
        assert data.report.unopened_rows == data.report.chat_rows == 2
    opened = {"messages": [*QUESTION, {"role": "assistant", "content": "<think>four."}]}
    data = load_data(write("x.jsonl", [opened, {"messages": QUESTION + ANSWER}, {"messages": QUESTION}]), tokenizer, 99)
    assert data.report.unopened_rows == 1

    counting = byte_bpe("{{ messages | length }}" + CHATML, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="x.jsonl:1: the chat template writes 'prompt' differently"):
        load_data(write("x.jsonl", [{"prompt": QUESTION, "completion": ANSWER}]), counting, 99)


@pytest.mark.parametrize(
    "template, trained",
    [
        (CHATML.partition("{% if add_generation_prompt")[0], "four.<|im_end|>\n"),
        (CHATML.replace("{{ '<|im_start|>assistant\n' }}", ""), "four.<|im_end|>\n"),  # it asks, and does nothing
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", " four.\n"),
        # Nothing but white space is no header: Llama 2's answers begin with a space.
        ("{% for m in messages %}{{ ('Q' if m.role == 'user' else ' ') + m.content + '\n' }}{% endfor %}", " four.\n"),
    ],
)
def test_a_template_without_a_generation_prompt_has_the_header_that_it_writes(write, template, trained):
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    talk = [*ANSWER, *QUESTION, *ANSWER]
    for row, masking in (({"prompt": QUESTION, "completion": ANSWER}, None), ({"messages": talk}, ASSISTANT)):
        data = load_data(write("x.jsonl", [row]), tokenizer, 99, masking=masking)
        assert trained_text(tokenizer, data[0].labels.tolist())[-1] == trained
        assert data.report.unopened_rows == 0
    whole = load_data(write("x.jsonl", [{"messages": QUESTION + ANSWER}]), tokenizer, 99)
    assert -100 not in whole[0].labels.tolist()


def test_tools_reach_the_template(write):
    tokenizer = byte_bpe("{{ tools[0]['name'] if tools else 'none' }} " + CHATML, eos_token="<|im_end|>")
    lines = [{"messages": QUESTION}, {"messages": QUESTION, "tools": [{"name": "plus", "parameters": {}}]}]
    data = load_data(write("x.jsonl", lines), tokenizer, 99)
    assert [tokenizer.decode(ids)[:5] for ids, _ in rows(data)] == ["none ", "plus "]


def test_chat_template_missing_or_refusing(bare, write):
    for row in ({"messages": QUESTION}, {"prompt": QUESTION, "completion": ANSWER}):
        with pytest.raises(ValueError, match="x.jsonl:1: chat messages, but the tokenizer has no chat template"):
            load_data(write("x.jsonl", [row]), bare, 99)
    strict = byte_bpe("{{ raise_exception('Roles must\nalternate') }}")
    with pytest.raises(ValueError, match=r"x.jsonl:1: the chat template refuses .*\(Roles must alternate\)"):
        load_data(write("x.jsonl", [{"messages": QUESTION}]), strict, 99)


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


# Templates that write an answer otherwise once others follow, in the ways of Qwen3 (only answers behind the last
# question keep their thoughts), gpt-oss (the last message ends in another token), and others (a turn has no end of its
# own, but the conversation has).
THOUGHTS = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>' + (m.thoughts or '') + '</think>' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LAST_END = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{{- '<|pad|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
NO_END = """{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""
TOOL = [
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "call", "thoughts": "first"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "four", "thoughts": "then"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "Five"},
    {"role": "user", "content": "thanks"},
]


def seen_at_inference(tokenizer, messages):
    """What precedes each answer when the model gives it, and what it then has to write."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
            assert whole.startswith(before)
            yield before, whole.removeprefix(before)


@pytest.mark.parametrize(
    "template, eos, talk, count",
    [
        (THOUGHTS, "<|im_end|>", TALK, 2),
        (THOUGHTS, "<|im_end|>", TOOL, 2),  # the call and the answer to it are seen together
        (THOUGHTS, "<|im_end|>", TALK[:3], 1),
        (LAST_END, "<|pad|>", TALK, 2),
        (LAST_END, "<|pad|>", TOOL, 3),
        (NO_END, "<|im_end|>", TALK, 2),
        (CHATML, "<|im_end|>", TOOL, 1),
    ],
)
def test_every_answer_is_trained_once_as_the_model_sees_it(write, template, eos, talk, count):
    tokenizer = byte_bpe(template, eos_token=eos)
    data = load_data(write("x.jsonl", [{"messages": talk}]), tokenizer, 999, masking=ASSISTANT)
    found = []
    for ids, labels in rows(data):
        for place, label in enumerate(labels):
            if label != -100 and labels[place - 1] == -100:
                stop = next((end for end in range(place, len(labels)) if labels[end] == -100), len(labels))
                found.append((tokenizer.decode(ids[:place]), tokenizer.decode(ids[place:stop])))
    assert sorted(found) == sorted(seen_at_inference(tokenizer, talk))
    assert len(data) == count and data.report.split_rows == (count if count > 1 else 0)
    assert data.report.dropped_rows == 0  # the whole, where every answer has a row of its own, is none
    assert (f"1 conversations made into {count} rows" in data.report.describe()) == (count > 1)


def test_rewritten_answers_of_a_prompt_count_only_where_prompts_are_trained(write):
    tokenizer = byte_bpe(THOUGHTS, eos_token="<|im_end|>")
    path = write("x.jsonl", [{"prompt": TALK[:4], "completion": TALK[4:]}])
    for completion_only, count in ((None, 1), (False, 2)):
        data = load_data(path, tokenizer, 999, masking=Masking(completion_only, assistant_only_loss=True))
        found = [trained_text(tokenizer, labels) for _, labels in rows(data)]
        assert found[0] == ["<think></think>Five.<|im_end|>\n"] and len(found) == count


def test_a_template_that_counts_turns_is_an_error_that_names_the_row(write):
    tokenizer = byte_bpe("{{ messages | length }}" + CHATML, eos_token="<|im_end|>")
    path = write("x.jsonl", [{"messages": TALK}])
    with pytest.raises(ValueError, match=r"x.jsonl:1: the chat template writes what comes before message 5 ") as error:
        load_data(path, tokenizer, 999, masking=ASSISTANT)
    assert "\n" not in str(error.value)
    marked = byte_bpe("{{ messages | length }}" + MARKED, eos_token="<|im_end|>")
    ((_, labels),) = rows(load_data(path, marked, 999, masking=ASSISTANT))
    assert trained_text(marked, labels) == ["four.<|im_end|>\n", "Five.<|im_end|>\n"]


# --- messages that say whether they are trained ---------------------------------------------------------------------

OFF = [TALK[0], TALK[1], TALK[2] | {"weight": 0}, TALK[3], TALK[4] | {"weight": 1}]


@pytest.mark.parametrize(
    "template", [CHATML, MARKED, THOUGHTS, LAST_END], ids=["prefixes", "marked", "thoughts", "end"]
)
def test_an_answer_of_weight_0_is_context_alone(write, template):
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    data = load_data(write("x.jsonl", [{"messages": OFF}]), tokenizer, 999, masking=ASSISTANT)
    ((ids, labels),) = rows(data)
    ((stretch),) = trained_text(tokenizer, labels)
    assert "Five." in stretch and "four." in tokenizer.decode(ids) and "four." not in stretch
    assert data.report.masked_messages == 1 and "1 messages masked by their own keys" in data.report.describe()


def test_without_assistant_only_loss_the_rest_is_trained(write):
    tokenizer = byte_bpe(eos_token="<|im_end|>")
    ((_, labels),) = rows(load_data(write("x.jsonl", [{"messages": OFF}]), tokenizer, 999))
    first, second = trained_text(tokenizer, labels)
    assert first.endswith("plus two?<|im_end|>\n<|im_start|>assistant\n") and second.startswith("<|im_start|>user\nAnd")
    quiet = [TALK[0], TALK[1] | {"train": False}, *TALK[2:]]
    ((_, labels),) = rows(load_data(write("x.jsonl", [{"messages": quiet}]), tokenizer, 999))
    first, second = trained_text(tokenizer, labels)
    assert first.endswith("Be short.<|im_end|>\n") and second.startswith("<|im_start|>assistant\nfour.")
    path = write("x.jsonl", [{"prompt": OFF[:4], "completion": OFF[4:]}, {"prompt": TALK[:2], "completion": OFF[2:]}])
    stretches = [trained_text(tokenizer, labels) for _, labels in rows(load_data(path, tokenizer, 999))]
    assert stretches[0] == ["Five.<|im_end|>\n"] and stretches[1][0].startswith("<|im_start|>user\nAnd three?")


def test_a_message_that_cannot_be_left_out_says_what_can(write):
    tokenizer = byte_bpe(LAST_END, eos_token="<|pad|>")
    path = write("x.jsonl", [{"messages": OFF}])
    with pytest.raises(ValueError, match="x.jsonl:1: message 3 says .* train with assistant_only_loss"):
        load_data(path, tokenizer, 999)
    assert len(load_data(path, tokenizer, 999, masking=ASSISTANT)) == 1
    joined = byte_bpe("{% generation %}" + CHATML.replace("{% endfor %}", "{% endfor %}{% endgeneration %}"))
    with pytest.raises(ValueError, match="does not mark the 2 answers one by one"):
        load_data(path, joined, 999, masking=ASSISTANT)


def test_a_message_before_a_template_closes_the_conversation(write):
    """As Phi-3's does: what ends the text before a message is not there within the whole."""
    closing = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    talk = [*TALK[:3], TALK[3] | {"weight": 0}, TALK[4]]
    tokenizer = byte_bpe(closing, eos_token="<|pad|>")
    ((_, labels),) = rows(load_data(write("x.jsonl", [{"messages": talk}]), tokenizer, 999))
    first, second = trained_text(tokenizer, labels)
    assert first.endswith("four.<|im_end|>\n") and second == "<|im_start|>assistant\nFive.<|im_end|>\n<|pad|>"


# Templates under which the tokens of a system's message cannot be told: it is within the question, or no message alone.
WITHIN = """{{ '<|pad|>' }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + (system if loop.first else '') + m.content }}
{%- endfor %}"""
ASKED = "{% if messages | length == 1 %}{{ raise_exception('no question') }}{% endif %}" + CHATML


@pytest.mark.parametrize("template", [WITHIN, ASKED])
def test_a_systems_message_that_cannot_be_told_apart(write, template):
    tokenizer = byte_bpe(template, eos_token="<|pad|>")
    path = write("x.jsonl", [{"messages": [TALK[0] | {"weight": 0}, *TALK[1:3]]}])
    with pytest.raises(ValueError, match="x.jsonl:1: message 1 says .* train with assistant_only_loss"):
        load_data(path, tokenizer, 999)
    ((_, labels),) = rows(load_data(path, tokenizer, 999, masking=ASSISTANT))
    assert len(trained_text(tokenizer, labels)) == 1 and "Be short." not in trained_text(tokenizer, labels)[0]


def test_what_the_template_leaves_out_is_counted(write):
    silent = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
    talk = [*TALK[:2], {"role": "assistant", "content": "<think>hm</think>four."}]
    for template, count in ((silent, 1), (CHATML, 0)):
        report = load_data(write("x.jsonl", [{"messages": talk}]), byte_bpe(template), 999).report
        assert report.shortened_messages == count and ("does not write whole" in report.describe()) == bool(count)


@pytest.mark.parametrize("role", ["prompter", "developer", "function", "tool", "user ", "Critic"])
def test_roles_that_the_template_passes_over_are_counted(write, role):
    chosen = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role in known %}")
    path = write("x.jsonl", [{"messages": [*TALK[:3], {"role": role, "content": "And?"}, *TALK[4:]]}])
    for known, count in (("['system', 'user', 'assistant']", 1), (repr([role, *["system", "user", "assistant"]]), 0)):
        for masking in (Masking(), ASSISTANT):
            tokenizer = byte_bpe(chosen.replace("known", known))
            assert load_data(path, tokenizer, 999, masking=masking).report.shortened_messages == count


def test_what_a_tool_says_may_be_written_as_json(write):
    tokenizer = byte_bpe(CHATML.replace("message['content'] +", "(message['content'] | tojson) +"))
    talk = [*TALK[:2], {"role": "tool", "content": 'é "four"\nand more'}, *ANSWER]
    assert load_data(write("x.jsonl", [{"messages": talk}]), tokenizer, 999).report.shortened_messages == 0


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_that_the_template_drops_from_earlier_answers_are_counted(write, key):
    last = f"{{% if loop.last and message.{key} %}}<think>{{{{ message.{key} }}}}</think>{{% endif %}}"
    template = CHATML.replace("{{ '<|im_start|>'", last + "{{ '<|im_start|>'")
    talk = [message | ({key: f"hm {place}"} if place in (2, 4) else {}) for place, message in enumerate(TALK)]
    path = write("x.jsonl", [{"messages": talk}])
    assert load_data(path, byte_bpe(template), 999).report.shortened_messages == 1
    assert load_data(path, byte_bpe(template), 999, masking=ASSISTANT).report.shortened_messages == 0  # two rows
    report = load_data(path, byte_bpe(), 999).report  # a key that the template never mentions is said as such
    assert report.shortened_messages == 0 and report.unused_keys == {f"messages[].{key}": 2}


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


def test_marks_in_a_token_across_the_end_of_the_prompt(write):
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "/": 2, "//": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Punctuation("contiguous")
    template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)
    row = {"prompt": [QUESTION[0] | {"content": "a/"}], "completion": [ANSWER[0] | {"content": "/a"}]}
    path = write("x.jsonl", [row])
    with pytest.raises(ValueError, match="x.jsonl:1: a token lies across the end of 'prompt'; leave out completion_"):
        load_data(path, tokenizer, 99, masking=ASSISTANT)
    masking = Masking(completion_only_loss=False, assistant_only_loss=True)
    assert len(load_data(path, tokenizer, 99, masking=masking)) == 1


def test_marks_need_a_fast_tokenizer(write, monkeypatch):
    tokenizer = byte_bpe(MARKED, eos_token="<|im_end|>")
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ValueError, match="x.jsonl:1: .*needs a fast tokenizer"):
        load_data(write("x.jsonl", [{"messages": TALK}]), tokenizer, 99, masking=ASSISTANT)
