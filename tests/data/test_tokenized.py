"""Rows in flat arrays, in memory or in a file; what the report says is what they are."""

import numpy as np
import pytest
import torch
from texts import QUESTION, SENTENCES, encode, rows, text_data

from mebp_triton.data.batching import collate, valid_tokens
from mebp_triton.data.loading import load_data


def test_rows_are_cut_and_a_fully_masked_one_is_dropped(tokenizer, write):
    row = {"prompt": "What is two plus two?", "completion": " Two plus two is four."}
    head = len(encode(tokenizer, row["prompt"]))
    (whole, _), *_ = rows(load_data(write("x.jsonl", [row]), tokenizer, 99))
    good = {"text": "The cat"}

    def at(max_length):
        return load_data(write("x.jsonl", [row, good]), tokenizer, max_length)

    cut = at(head + 1)  # one token of the completion is left
    assert rows(cut)[0] == (whole[: head + 1], [-100] * head + [whole[head]])
    assert (cut.report.rows, cut.report.truncated_rows, cut.report.dropped_rows) == (2, 1, 0)
    for max_length in (head, head - 1):
        report = at(max_length).report
        assert (report.rows, report.truncated_rows, report.dropped_rows) == (1, 0, 1)
    assert at(len(whole)).report.truncated_rows == 0
    assert at(len(whole) - 1).report.truncated_rows == 1


def test_a_first_token_is_nothing_to_train(tokenizer, bare, write):
    # "T" alone is one token: with eos a row of two, without it nothing is predicted.
    path = write("x.jsonl", [{"text": "The cat"}, {"text": "T"}, {"text": ""}, {"prompt": "", "completion": "T"}])
    assert [len(ids) for ids, _ in rows(load_data(path, tokenizer, 99))][1:] == [2, 2]
    assert load_data(path, bare, 99).report.dropped_rows == 3


def test_storage_is_flat_and_lean(tokenizer, write):
    data = text_data(tokenizer, write, 100, 8)
    assert (data.ids.dtype, data.trained.dtype) == (np.int32, np.bool_)
    assert data.ids.nbytes + data.trained.nbytes == 5 * data.report.tokens
    example = data[0]
    assert example.input_ids.dtype == example.labels.dtype == torch.int64
    example.input_ids.zero_(), example.labels.zero_()
    assert data[0].input_ids.any() and data[0].labels.any()  # an example is a copy
    with pytest.raises(IndexError):
        data[len(data)]


def test_report_agrees_with_the_rows(tokenizer, write):
    lines = [{"text": s} for s in SENTENCES] + [{"prompt": s, "completion": s} for s in SENTENCES]
    path = write("x.jsonl", [*lines, {"messages": QUESTION}, {"text": ""}])
    data = load_data(path, tokenizer, 15)
    report = data.report
    assert report.tokens == sum(len(ids) for ids, _ in rows(data))
    assert report.trained_tokens == sum(valid_tokens(collate([example], None)) for example in data)
    assert report.rows + report.dropped_rows == 8 and report.truncated_rows > 0
    assert report.masked_tokens == sum(labels.count(-100) for _, labels in rows(data)) > 0
    whole = load_data(path, tokenizer, 10**6).report
    assert report.truncated_tokens == whole.tokens - report.tokens > 0
    assert report.describe() == (
        f"{report.rows} rows, {report.tokens} tokens ({report.trained_tokens} trained, {report.masked_tokens} masked), "
        f"{report.truncated_rows} rows truncated ({report.truncated_tokens} tokens cut off), "
        f"{report.dropped_rows} dropped"
    )
