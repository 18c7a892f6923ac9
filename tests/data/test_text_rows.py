"""JSON lines, JSON arrays and CSV: the same rows, and faults with the number of their row."""

import csv
import io
import json

import pytest
from texts import ANSWER, QUESTION, TALK, rows

from mebp_triton.data import text_rows
from mebp_triton.data.loading import load_data

LINES = [
    {"messages": QUESTION + ANSWER},
    {"text": 'The "cat",\nsat \u2028 caf\u00e9 [{'},
    {"prompt": "What is two plus two?", "completion": " four."},
] * 9


@pytest.fixture
def wanted(tokenizer, write):
    return rows(load_data(write("wanted.jsonl", LINES), tokenizer, 99))


@pytest.mark.parametrize("piece", [1, 3, 64, 1 << 20])
@pytest.mark.parametrize(
    "name, content",
    [
        ("x.json", json.dumps(LINES)),
        ("x.json", "\ufeff" + json.dumps(LINES, indent=2, ensure_ascii=False) + "\r\n\n"),
        ("x.json", " " + json.dumps(LINES, separators=(",", ":"))),
        ("x.json", "\n".join(map(json.dumps, LINES))),  # JSON lines by another name
        ("x.json", "".join(json.dumps(line, indent=1) for line in LINES)),
        ("x.jsonl", "\ufeff \n" + json.dumps(LINES)),
    ],
)
def test_json_has_the_rows_of_json_lines(tokenizer, write, wanted, monkeypatch, name, content, piece):
    monkeypatch.setattr(text_rows, "PIECE_CHARS", piece if name == "x.json" else 64)
    assert rows(load_data(write(name, content), tokenizer, 99)) == wanted


def table(lines, **options):
    names = sorted({key for line in lines for key in line})
    text = io.StringIO()
    writer = csv.DictWriter(text, names, **options)
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


PAIRS = [{"prompt": "The cat", "completion": ' "sat",\r\non the mat'}, {"prompt": "", "completion": "four"}]


@pytest.mark.parametrize("options", [{}, {"lineterminator": "\n"}, {"quoting": csv.QUOTE_ALL}], ids=str)
def test_csv_has_the_rows_of_json_lines(tokenizer, write, options):
    same = rows(load_data(write("x.jsonl", PAIRS), tokenizer, 99))
    assert rows(load_data(write("x.csv", "\ufeff" + table(PAIRS, **options) + "\n\n"), tokenizer, 99)) == same
    chats = [{"messages": json.dumps(TALK), "source": "a", "weight": weight} for weight in (1, 0, "")]
    data = load_data(write("y.csv", table(chats)), tokenizer, 999)
    assert rows(data) == rows(load_data(write("y.jsonl", [{"messages": TALK}] * 2), tokenizer, 999))
    assert data.report.unused_keys == {"source": 3, "weight": 1} and data.report.dropped_rows == 1


def test_columns_of_a_table_without_a_name(tokenizer, write):
    """pandas and R write the rows' numbers as such a column."""
    data = load_data(write("x.csv", ",text,\n0,a cat,b\n1,two,\n"), tokenizer, 99)
    assert rows(data) == rows(load_data(write("y.jsonl", [{"text": "a cat"}, {"text": "two"}]), tokenizer, 99))
    assert data.report.unused_keys == {"column 1": 2, "column 3": 2}


def test_messages_in_the_cells_of_prompt_and_completion(tokenizer, write):
    pair = {"prompt": QUESTION, "completion": ANSWER}
    wanted = rows(load_data(write("x.jsonl", [pair]), tokenizer, 99))
    cells = {key: json.dumps(messages) for key, messages in pair.items()}
    assert rows(load_data(write("x.csv", table([cells])), tokenizer, 99)) == wanted
    assert rows(load_data(write("y.jsonl", [cells]), tokenizer, 99)) == wanted
    for no_messages in ("[1]", "[]", "[four", '[{"a": 1}]', "four"):
        data = load_data(write("z.jsonl", [cells | {"completion": no_messages}]), tokenizer, 999)
        assert data.report.string_rows == 1 and data.report.chat_rows == 0
        assert tokenizer.decode(data[0].input_ids).startswith(cells["prompt"] + no_messages)


def test_a_long_cell_and_the_limit_of_others(tokenizer, write):
    before = csv.field_size_limit()
    data = load_data(write("x.csv", table([{"text": "a cat " * 50_000}])), tokenizer, 999)
    assert len(data) == 1 and data.report.truncated_rows == 1 and csv.field_size_limit() == before


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.json", '[{"text": "a cat"}, {"text": "b}]', ":2: broken JSON .Unterminated string"),
        ("x.json", '[{"text": "a cat"} {"text": "b"}]', ":2: broken JSON .a comma or ] is wanted, got '{'"),
        ("x.json", '[{"text": "a cat"}, ]', ":2: broken JSON .a comma before the end"),
        ("x.json", '[{"text": "a cat"}', ":2: broken JSON .a comma or ] is wanted, got ''"),
        ("x.json", '[{"text": "a cat"}] {}', ":1: broken JSON .'{' behind the end"),
        ("x.json", '[{"text": "a cat"}, [1]]', ":2: a row must be a JSON object, got list"),
        ("x.json", '[{"text": "a", "text": "b"}]', ":1: broken JSON .*'text' stands twice"),
        ("x.json", "[" * 100_000, ":1: broken JSON"),
        ("x.json", "[]", ": nothing to train on, it is empty"),
        ("x.json", "", ": nothing to train on, it is empty"),
        ("x.json", '{"data": [{"text": "a"}]}', r":1: unknown row, with the keys \['data'\]"),
        ("x.json", b'[{"text": "caf\xe9"}]', ":1: not UTF-8"),
        ("x.jsonl", '[{"text": "a cat"}, {"x": 1}]', ":2: unknown row"),
        ("x.jsonl", '{\n"text": "a cat"\n}', ":1: broken JSON .*or name the file .json"),
        ("x.csv", "text,id\na cat\n", ":2: 1 cells, and the first row names 2"),
        ("x.csv", 'text,id\n"a\ncat",1\na,b,c\n', ":4: 3 cells, and the first row names 2"),
        ("x.csv", 'text\n"a cat\n', ":2: broken CSV .unexpected end of data"),
        ("x.csv", 'text\n"a" cat\n', ":2: broken CSV"),
        ("x.csv", "text,text\na,b\n", ":1: the first row must name the columns, each by another name"),
        ("x.csv", "prompt;completion\na;b\n", ":1: the columns are separated by semicolons: save"),
        ("x.csv", '"prompt";"completion"\n"a, b";"c"\n', ":1: the columns are separated by semicolons"),
        ("x.csv", "prompt\tcompletion\na, b\tc\n", ":1: the columns are separated by tabs"),
        ("x.csv", "prompt|completion\na|b\n", r":1: the columns are separated by bars \(\|\)"),
        ("x.csv", b"text\ncaf\xe9\n", ": ?1?:?.*not UTF-8"),
        ("x.csv", "", ": nothing to train on, it is empty"),
        ("x.csv", "text\n", ": nothing to train on, it is empty"),
    ],
)
def test_a_fault_is_one_line_that_says_where(tokenizer, write, name, content, message):
    with pytest.raises(ValueError, match=name + message) as error:
        load_data(write(name, content), tokenizer, 99)
    assert type(error.value) is ValueError and "\n" not in str(error.value)


def test_what_is_no_json_lines_may_be_named_json(tokenizer, write):
    """As the message about a broken line says."""
    content = json.dumps(LINES[0], indent=2)
    assert rows(load_data(write("x.json", content), tokenizer, 99)) == rows(
        load_data(write("y.jsonl", LINES[:1]), tokenizer, 99)
    )
