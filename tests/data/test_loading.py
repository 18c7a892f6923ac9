"""Files to tokenised rows: what is wrong with a file is one line that says where."""

import json
import tracemalloc

import pyarrow.parquet
import pytest
import torch
from texts import QUESTION, SENTENCES, rows

from mebp_triton.data.batching import batches, collate
from mebp_triton.data.loading import load_data
from mebp_triton.data.packing import pack
from mebp_triton.system.errors import FileError
from mebp_triton.system.scratch import ScratchArray


def test_one_file_mixes_kinds_and_skips_blank_lines(tokenizer, write):
    lines = [{"text": "The cat"}, {"prompt": "two", "completion": " plus"}, {"messages": QUESTION, "source": 3}]
    alone = [rows(load_data(write("one.jsonl", [line]), tokenizer, 99))[0] for line in lines]
    content = "\n\r\n".join(json.dumps(line) for line in lines) + "\n  \n"
    assert rows(load_data(write("mixed.JSONL", content), tokenizer, 99)) == alone


def test_only_newlines_end_a_row(tokenizer, write):
    line = json.dumps({"text": "The\u2028cat\x85sat"}, ensure_ascii=False)
    assert len(load_data(write("x.jsonl", line), tokenizer, 99)) == 1


GOOD = '{"text": "The cat"}\n'


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("x.xlsx", "a,b", "unknown suffix '.xlsx'; give a .txt, .jsonl, .json, .csv or .parquet"),
        ("x", "a", "unknown suffix ''"),
        ("x.txt", "", "nothing to evaluate, it is empty; add text$"),
        ("x.jsonl", "\n\n", "nothing to evaluate, it is empty; add text$"),
        (
            "x.jsonl",
            '{"text": ""}\n',
            "nothing to evaluate, all 1 rows are too short or fully masked; add longer rows, or mask less$",
        ),
        (
            "x.jsonl",
            [{"prompt": SENTENCES[0] * 9, "completion": "a"}],
            r"fully masked; raise max_length \(now 99\): what 1 would train is cut off$",
        ),
        ("x.txt", b"caf\xe9 cat", "x.txt: not UTF-8"),
        ("x.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}', "x.jsonl:2: not UTF-8"),
        ("x.jsonl", GOOD + '{"text": "\\ud800 cat"}', "x.jsonl:2: half a surrogate pair is no text"),
        ("x.jsonl", GOOD + "\n" + '{"text": "The cat}', "x.jsonl:3: broken JSON"),
        ("x.jsonl", GOOD + "[" * 100_000, "x.jsonl:2: broken JSON"),
        ("x.jsonl", GOOD + "[1, 2]", r"x.jsonl:2: a row must be a JSON object, got list \[1, 2\]"),
        ("x.jsonl", GOOD + '{"title": "a", "body": "b"}', r"x.jsonl:2: unknown row, with the keys \['body', 'title'\]"),
        ("x.jsonl", GOOD + '{"prompt": "a"}', r"x.jsonl:2: unknown row, with the keys \['prompt'\]"),
        ("x.jsonl", GOOD + '{"text": "a", "messages": []}', "x.jsonl:2: row of more than one kind"),
        ("x.jsonl", GOOD + '{"text": 5}', "x.jsonl:2: 'text' must be a string, got int 5"),
        (
            "x.jsonl",
            GOOD + '{"prompt": "a", "completion": null}',
            "unknown row, with the keys \\['prompt'\\] that are not null",
        ),
        ("x.jsonl", GOOD + '{"prompt": "a", "completion": []}', "two strings or two lists"),
        ("x.jsonl", [{"prompt": QUESTION, "completion": []}], "x.jsonl:1: 'completion' must be a list of messages"),
        ("x.jsonl", GOOD + '{"messages": "hi"}', "x.jsonl:2: 'messages' is a string that is not JSON"),
        ("x.jsonl", GOOD + '{"messages": 5}', "x.jsonl:2: 'messages' must be a list of messages"),
        ("x.jsonl", GOOD + '{"prompt": [], "completion": []}', "must be a list of messages, not empty"),
        ("x.jsonl", GOOD + '{"messages": ["hi"]}', "must be an object with 'role' and 'content', got str 'hi'"),
        ("x.jsonl", GOOD + '{"messages": [{"content": "hi"}]}', "must be an object with 'role' and 'content'"),
        ("x.jsonl", GOOD + '{"messages": [{"role": "user", "content": 5}]}', "must be a string, got int 5"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tokenizer, write, file, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_data(write(file, content), tokenizer, 99, name="validation-file")
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    assert str(caught.value).startswith("validation-file /")


def test_max_length_below_two(tokenizer, write):
    with pytest.raises(ValueError, match="max_length must be at least 2.* got 1"):
        load_data(write("x.txt", "The cat"), tokenizer, 1)


# --- in a file ------------------------------------------------------------------------------------------------------


def test_rows_in_a_file_are_those_in_memory(tokenizer, write, tmp_path):
    """And so are their report, their checksum, and the batches of every epoch."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    lines = [{"text": sentence * count} for sentence in SENTENCES for count in range(1, 9)]
    lines += [{"prompt": sentence, "completion": sentence} for sentence in SENTENCES]
    for path in (write("x.jsonl", lines), write("x.txt", " ".join(SENTENCES) * 50)):
        memory, stored = load_data(path, tokenizer, 40), load_data(path, tokenizer, 40, scratch=scratch)
        assert rows(stored) == rows(memory) and stored.report == memory.report
        assert stored.checksum() == memory.checksum()
        assert pack(stored, 40).checksum() == pack(memory, 40).checksum()
        for ours, theirs in ((stored, memory), (pack(stored, 40), pack(memory, 40))):
            for some, others in zip(batches(ours, 3, 0, epochs=2), batches(theirs, 3, 0, epochs=2), strict=True):
                for name, tensor in collate(some, 0).items():
                    assert torch.equal(tensor, collate(others, 0)[name])
        assert list(scratch.iterdir()) == [], "something of them would outlive the process"


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x.parquet"])
def test_memory_while_reading_does_not_grow_with_the_file(tokenizer, tmp_path, name):
    """What Python allocates at its peak, for eight times the rows, beside the 8 bytes (and twice) that a row takes."""
    line = " ".join(SENTENCES).strip()
    few = 600 if name == "x.txt" else 300  # text is tokenised by pieces of 64 Ki characters

    def peak(count, scratch):
        path = tmp_path / f"{count}-{name}"
        if name == "x.parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [line] * count}), path, row_group_size=200)
        elif name == "x.json":
            path.write_text(json.dumps([{"text": line}] * count))
        else:
            row = json.dumps({"text": line}) if name == "x.jsonl" else line
            path.write_text((row + "\n") * count)
        tracemalloc.start()
        try:
            data = load_data(path, tokenizer, 64, scratch=scratch)
            return tracemalloc.get_traced_memory()[1] - 24 * len(data)
        finally:
            tracemalloc.stop()

    peak(50, tmp_path)  # what is made once
    bound = peak(few, tmp_path) + (1 << 18)
    assert peak(8 * few, tmp_path) < bound < peak(8 * few, None)


def test_a_full_disk_is_one_line(tokenizer, write, tmp_path, monkeypatch):
    def full(self, values):
        raise FileError("cannot write a scratch file in here: No space left on device")

    monkeypatch.setattr(ScratchArray, "extend", full)
    for path in (write("x.jsonl", GOOD), write("x.txt", "The cat")):
        with pytest.raises(ValueError, match="cannot write a scratch file in here: No space left"):
            load_data(path, tokenizer, 40, scratch=tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
def test_reading_ends_where_there_are_enough_tokens(tokenizer, write, name):
    content = [{"text": "The cat"}] * 50 if name.endswith("jsonl") else "The cat\n" * 200
    path = write(name, content)
    everything, some = load_data(path, tokenizer, 8), load_data(path, tokenizer, 8, most_tokens=20)
    assert rows(some) == rows(everything)[: len(some)]
    assert 20 <= some.report.tokens < 20 + 8 < everything.report.tokens
