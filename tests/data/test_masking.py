"""Masking: what was asked for is done, or refused with a reason."""

import pytest
from texts import QUESTION, rows

from mebp_triton.data.loading import load_data
from mebp_triton.data.masking import Masking

ASSISTANT = Masking(assistant_only_loss=True)


def test_completion_only_loss_by_hand(tokenizer, write):
    row = {"prompt": "What is two plus two?", "completion": " four."}
    path = write("x.jsonl", [row])
    ((ids, masked),) = rows(load_data(path, tokenizer, 99, masking=Masking(True)))
    assert rows(load_data(path, tokenizer, 99)) == [(ids, masked)] and -100 in masked
    assert rows(load_data(path, tokenizer, 99, masking=Masking(False))) == [(ids, ids)]


@pytest.mark.parametrize(
    "row, masking, message",
    [
        ({"text": "a"}, Masking(True), "x.jsonl:1: completion_only_loss needs 'prompt' and 'completion', and this is"),
        ({"text": "a"}, ASSISTANT, "x.jsonl:1: assistant_only_loss needs chat messages, and this is text"),
        ({"messages": QUESTION}, Masking(True), "x.jsonl:1: completion_only_loss needs .* this row has messages"),
        ({"prompt": "a", "completion": "b"}, ASSISTANT, "x.jsonl:1: assistant_only_loss needs chat messages"),
    ],
)
def test_a_row_that_cannot_be_masked_as_wanted(tokenizer, write, row, masking, message):
    with pytest.raises(ValueError, match=message):
        load_data(write("x.jsonl", [row]), tokenizer, 99, masking=masking)


def test_text_cannot_be_masked(tokenizer, write):
    for masking in (Masking(True), ASSISTANT):
        with pytest.raises(ValueError, match="x.txt: .* this is text: leave it out"):
            load_data(write("x.txt", "The cat"), tokenizer, 99, masking=masking)
