"""What a row gives to the chat template beside its messages, and templates that take contents as parts."""

import json
from datetime import datetime

import pytest
from texts import ANSWER, CHATML, QUESTION, byte_bpe, rows

from mebp_triton.data.loading import load_data
from mebp_triton.data.template import Headers, Template


def test_tools_may_be_json_in_a_string(write):
    tokenizer = byte_bpe("{{ tools[0]['name'] if tools else 'none' }} " + CHATML, eos_token="<|im_end|>")
    tools = [{"name": "plus", "parameters": {}}]
    forms = [{"messages": QUESTION, "tools": tools}, {"messages": QUESTION, "tools": json.dumps(tools)}]
    first, second = rows(load_data(write("x.jsonl", forms), tokenizer, 99))
    assert first == second
    assert rows(load_data(write("y.jsonl", [{"messages": QUESTION, "tools": ""}]), tokenizer, 99)) != [first]


def test_arguments_of_a_row_reach_the_template(write):
    tokenizer = byte_bpe("{{ 'slow' if enable_thinking else 'fast' }}{{ messages[0].content }}")
    lines = [{"messages": QUESTION}, {"messages": QUESTION, "chat_template_kwargs": {"enable_thinking": True}}]
    lines.append({"messages": QUESTION, "chat_template_kwargs": '{"enable_thinking": true}'})
    data = load_data(write("x.jsonl", lines), tokenizer, 99)
    assert [tokenizer.decode(ids)[:4] for ids, _ in rows(data)] == ["fast", "slow", "slow"]
    assert data.report.unused_keys == {}


# As those of models that read images: a content that is a string is written as nothing, or refused.
SILENT = """{% for m in messages %}{{ m.role + ':' }}{% for part in m.content %}{% if part.type == 'text' %}
{{- part.text + ';' }}{% endif %}{% endfor %}{% endfor %}"""
STRICT = SILENT.replace("part.type == 'text'", "part['type'] + '' == 'text'")
EITHER = """{% for m in messages %}{% if m.content is string %}{{ m.role + ':' + m.content + ';' }}
{%- else %}type text{% endif %}{% endfor %}"""


@pytest.mark.parametrize("template", [SILENT, STRICT, EITHER])
def test_a_template_of_parts_gets_parts(write, template):
    tokenizer = byte_bpe(template)
    ((ids, _),) = rows(load_data(write("x.jsonl", [{"messages": QUESTION + ANSWER}]), tokenizer, 99))
    assert tokenizer.decode(ids) == "user:What is two plus two?;assistant:four.;"


def test_a_template_that_takes_neither_form_says_why(write):
    with pytest.raises(ValueError, match="x.jsonl:1: the chat template refuses the messages .no type of text."):
        load_data(write("x.jsonl", [{"messages": QUESTION}]), byte_bpe("{{ raise_exception('no type of text') }}"), 99)


@pytest.mark.parametrize("defined", ["", "{% if strftime_now is defined %}"])
def test_the_date_that_a_template_writes_is_the_one_that_is_given(write, defined):
    dated = "{{ strftime_now('%d %b %Y') + ': ' }}" + CHATML
    if defined:
        dated = defined + "{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day + ': ' }}" + CHATML
    tokenizer, path = byte_bpe(dated), write("x.jsonl", [{"messages": QUESTION + ANSWER}])
    ((ids, _),) = rows(load_data(path, tokenizer, 99, date=datetime(2024, 2, 29)))
    assert tokenizer.decode(ids).startswith("29 Feb 2024: <|im_start|>")
    ((ids, _),) = rows(load_data(path, tokenizer, 99))
    assert datetime.now().strftime(" %Y: ") in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "template, writes",
    [
        (CHATML, False),
        ("{{ strftime_now('%d %b %Y') }}", True),
        ("{% if tools %}{{ strftime_now('%d') }}{% endif %}", False),
        ("{{ strftime_now('%d %b %Y') }}{{ raise_exception('no') }}", True),
    ],
)
def test_whether_a_template_writes_the_date(template, writes):
    assert Template.of(byte_bpe(template), {}).writes_date() == writes


def test_named_templates_without_a_default(write):
    tokenizer = byte_bpe({"rag": CHATML, "tool_use": "{{ tools[0].name }}" + CHATML})
    tools = [{"name": "plus", "parameters": {}}]
    assert len(load_data(write("x.jsonl", [{"messages": QUESTION, "tools": tools}]), tokenizer, 99)) == 1
    with pytest.raises(ValueError, match="x.jsonl:1: the tokenizer has chat templates named rag, tool_use, and none"):
        load_data(write("x.jsonl", [{"messages": QUESTION}]), tokenizer, 99)


CLOSED = "{% for m in messages %}{{ m.role + ' ' + m.content + '<|end|>' }}{% endfor %}"


@pytest.mark.parametrize(
    "template, prompt, written",
    [
        (CHATML, "<|im_start|>assistant\n", "<|im_start|>assistant\n"),
        (CLOSED, "", "assistant"),
        (CLOSED + "{{ 'assistant ' if add_generation_prompt else '<|im_end|>' }}", "assistant ", "assistant"),  # Phi-3
        # A text that begins otherwise where an answer is wanted has no known header.
        ("{{ 'go' if add_generation_prompt }}" + CLOSED, "", ""),
        ("{{ raise_exception('no') }}", "", ""),
    ],
)
def test_what_opens_an_answer(template, prompt, written):
    tokenizer = byte_bpe(template, eos_token="<|im_end|>")
    assert Template.of(tokenizer, {}).headers() == Headers(prompt, written)
    if prompt or written:
        asked = Template.of(tokenizer, {}).render(QUESTION, header=True)
        assert asked.endswith(prompt or written) and asked.count("assistant") == 1
