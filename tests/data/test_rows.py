"""Rows of strings: what their keys mean, and what of them is trained."""

import pytest
from texts import TALK, byte_bpe, encode, rows
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mebp_triton.data.loading import load_data


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


def test_tokenizer_without_eos_appends_nothing(bare, write):
    lines = [{"text": "The cat"}, {"prompt": "two", "completion": " plus"}]
    (text, _), (pair, labels) = rows(load_data(write("x.jsonl", lines), bare, 99))
    assert text == encode(bare, "The cat") and pair == encode(bare, "two plus")
    assert labels[-1] == pair[-1]
    assert len(load_data(write("x.txt", "The cat sat"), bare, 99)) == 1


def test_rows_of_strings_begin_as_the_tokenizer_begins_a_text(write):
    core = byte_bpe().backend_tokenizer
    core.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    (pad, end), cat, dog = (2, 1), encode(tokenizer, "the cat"), encode(tokenizer, " sat")
    path = write("x.jsonl", [{"text": "the cat"}, {"prompt": "the cat", "completion": " sat"}])
    first, second = rows(load_data(path, tokenizer, 99))
    assert first == ([pad, *cat, end], [pad, *cat, end])
    assert second == ([pad, *cat, *dog, end], [-100] * (1 + len(cat)) + [*dog, end])


@pytest.mark.parametrize("empty", [{"messages": []}, {"conversations": [], "system": "Be short."}])
def test_a_conversation_of_nothing_is_dropped_and_counted(write, empty):
    data = load_data(write("x.jsonl", [empty, {"messages": TALK}]), byte_bpe(), 999)
    assert len(data) == 1 and data.report.dropped_rows == 1
