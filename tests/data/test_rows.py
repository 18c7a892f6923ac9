"""Rows: what their keys mean, and what of them is trained."""

import pytest
from texts import ANSWER, CHATML, QUESTION, byte_bpe, encode, rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mebp_triton.data import load_data


def test_text_row_ends_in_eos_once(tokenizer, write):
    eos = tokenizer.eos_token_id
    ids = encode(tokenizer, "The cat sat on")
    path = write("x.jsonl", [{"text": "The cat sat on"}, {"text": "The cat sat on<|im_end|>"}])
    assert rows(load_data(path, tokenizer, 99)) == [(ids + [eos],) * 2] * 2


def test_completion_alone_is_trained(tokenizer, write):
    prompt, completion = "What is two plus two?", " four."
    head, rest = encode(tokenizer, prompt), encode(tokenizer, completion) + [tokenizer.eos_token_id]
    data = load_data(write("x.jsonl", [{"prompt": prompt, "completion": completion}]), tokenizer, 99)
    assert rows(data) == [(head + rest, [-100] * len(head) + rest)]
    assert data.report.trained_tokens == len(rest)


def test_prompt_ids_are_those_of_inference_where_a_token_straddles(tokenizer, write):
    prompt, completion = "The ca", "t sat"
    assert encode(tokenizer, prompt + completion)[: len(encode(tokenizer, prompt))] != encode(tokenizer, prompt)
    ((ids, labels),) = rows(load_data(write("x.jsonl", [{"prompt": prompt, "completion": completion}]), tokenizer, 99))
    head = len(encode(tokenizer, prompt))
    assert ids[:head] == encode(tokenizer, prompt) and labels[:head] == [-100] * head
    assert tokenizer.decode(ids[head:-1]) == completion and labels[head:] == ids[head:]


def test_completion_gets_no_space_that_is_not_there(write):
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "▁a": 1, "b": 2, "▁b": 3, ":": 4}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert encode(tokenizer, "b") == [3]
    data = load_data(write("x.jsonl", [{"prompt": "a:", "completion": "b"}]), tokenizer, 99)
    assert rows(data) == [([1, 4, 2], [-100, -100, 2])]


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


def test_tokenizer_without_eos_appends_nothing(bare, write):
    lines = [{"text": "The cat"}, {"prompt": "two", "completion": " plus"}]
    (text, _), (pair, labels) = rows(load_data(write("x.jsonl", lines), bare, 99))
    assert text == encode(bare, "The cat") and pair == encode(bare, "two plus")
    assert labels[-1] == pair[-1]
    assert len(load_data(write("x.txt", "The cat sat"), bare, 99)) == 1


def test_chat_template_missing_or_refusing(bare, write):
    for row in ({"messages": QUESTION}, {"prompt": QUESTION, "completion": ANSWER}):
        with pytest.raises(ValueError, match="x.jsonl:1: chat messages, but the tokenizer has no chat template"):
            load_data(write("x.jsonl", [row]), bare, 99)
    strict = byte_bpe("{{ raise_exception('Roles must\nalternate') }}")
    with pytest.raises(ValueError, match=r"x.jsonl:1: the chat template refuses .*\(Roles must alternate\)"):
        load_data(write("x.jsonl", [{"messages": QUESTION}]), strict, 99)
