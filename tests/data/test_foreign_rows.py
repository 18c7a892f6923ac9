"""Alpaca's rows: the same tokens and masks as the rows that they are converted to."""

import pytest
from texts import TALK, rows, trained_text

from mebp_triton.data.loading import load_data
from mebp_triton.data.masking import Masking

ASSISTANT = Masking(assistant_only_loss=True)


def test_alpaca_rows_are_prompt_and_completion(tokenizer, bare, write):
    lines = [
        {"instruction": "Add.", "input": "two two", "output": "four", "history": []},
        {"instruction": "Add.", "output": "four", "system": None},
        {"instruction": "Add.", "input": "", "output": "four", "system": "Be short."},
    ]
    answer = [{"role": "assistant", "content": "four"}]
    chats = [
        {"prompt": [{"role": "user", "content": "Add.\ntwo two"}], "completion": answer},
        {"prompt": [{"role": "user", "content": "Add."}], "completion": answer},
        {"prompt": [TALK[0], {"role": "user", "content": "Add."}], "completion": answer},
    ]
    path, same = write("x.jsonl", lines), write("y.jsonl", chats)
    assert rows(load_data(path, tokenizer, 999)) == rows(load_data(same, tokenizer, 999))
    assert load_data(path, tokenizer, 999).report.converted_rows == 3
    assert rows(load_data(path, tokenizer, 999, masking=ASSISTANT)) == rows(load_data(path, tokenizer, 999))

    (first, labels), (second, _) = rows(load_data(write("z.jsonl", lines[:2]), bare, 999))
    text = bare.decode(first)
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\ntwo two\n\n### Response:\nfour")
    assert trained_text(bare, labels) == ["four"]
    assert bare.decode(second).endswith("### Instruction:\nAdd.\n\n### Response:\nfour") and "Input" not in bare.decode(
        second
    )


@pytest.mark.parametrize(
    "row, message",
    [
        ({"instruction": "a", "output": 5}, "'output' must be a string, got int 5"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            "'history' beside 'instruction' is not supported",
        ),
    ],
)
def test_broken_alpaca_rows(tokenizer, write, row, message):
    with pytest.raises(ValueError, match=f"x.jsonl:1: .*{message}"):
        load_data(write("x.jsonl", [row]), tokenizer, 99)


def test_a_system_without_a_template_is_refused(bare, write):
    with pytest.raises(ValueError, match="x.jsonl:1: 'system' beside 'instruction' needs a chat template"):
        load_data(write("x.jsonl", [{"instruction": "a", "output": "b", "system": "c"}]), bare, 99)
