"""Where rows come from: files, directories of splits, saved datasets. All give the same rows."""

import gzip
import json
import os
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from texts import ANSWER, QUESTION, rows

from mebp_triton.data.loading import load_data
from mebp_triton.data.sources import check_source

MIXED = [
    {"messages": QUESTION + ANSWER},
    {"text": "The cat sat"},
    {"prompt": "What is two plus two?", "completion": " four."},
    {"instruction": "Add.", "input": "two two", "output": "four"},
    {"conversations": [{"from": "human", "value": "two"}, {"from": "gpt", "value": "four"}]},
]


@pytest.fixture
def wanted(tokenizer, write):
    return rows(load_data(write("wanted.jsonl", MIXED * 200), tokenizer, 99))


def test_parquet_has_the_rows_of_jsonl(tokenizer, tmp_path, wanted):
    """Arrow gives every row all keys; those that are None are none of its own."""
    table = pyarrow.Table.from_pylist(MIXED * 200, schema=_schema()).append_column("embedding", [[[0.5] * 8] * 1000])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=300)
    data = load_data(tmp_path / "x.parquet", tokenizer, 99)
    assert rows(data) == wanted and data.report.unused_keys == {"embedding": 1000}


def _schema():
    names = {key for row in MIXED for key in row}
    talk = {"messages": ("role", "content"), "conversations": ("from", "value")}
    kinds = {
        name: pyarrow.list_(pyarrow.struct([(key, pyarrow.string()) for key in talk[name]]))
        if name in talk
        else pyarrow.string()
        for name in names
    }
    return pyarrow.schema(sorted(kinds.items()))


def test_saved_datasets_have_the_rows_of_jsonl(tokenizer, tmp_path, wanted):
    table = pyarrow.Table.from_pylist(MIXED * 200, schema=_schema())
    whole = datasets.Dataset(table)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    assert rows(load_data(tmp_path / "one", tokenizer, 99)) == wanted
    splits = {"train": whole, "validation": whole.select(range(2)), "test": whole.select(range(1))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "several")
    assert rows(load_data(tmp_path / "several", tokenizer, 99)) == wanted
    assert rows(load_data(tmp_path / "several", tokenizer, 99, name="validation-file")) == wanted[:2]
    assert rows(load_data(tmp_path / "several" / "test", tokenizer, 99)) == wanted[:1]
    with pytest.raises(ValueError, match="is a directory with saved datasets, without held-out; give"):
        check_source(tmp_path / "several", "held-out")


def test_a_directory_with_a_file_per_split(tmp_path):
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert check_source(tmp_path) == [tmp_path / "train.jsonl"]
    assert check_source(tmp_path, "validation-file") == [tmp_path / "valid.jsonl"]
    (tmp_path / "validation.parquet").touch()
    with pytest.raises(ValueError, match="is a directory with validation.parquet and valid.jsonl; name the one"):
        check_source(tmp_path, "validation-file")


@pytest.mark.parametrize("place, end", [("data", ""), (".", "-0123456789abcdef")])
def test_shards_as_a_dataset_of_the_hub_has_them(tokenizer, tmp_path, wanted, place, end):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (tmp_path / "README.md").touch()
    for number, part in enumerate((slice(300), slice(300, 301), slice(301, None))):
        table = pyarrow.Table.from_pylist((MIXED * 200)[part], schema=_schema())
        pyarrow.parquet.write_table(table, folder / f"train-0000{number}-of-00003{end}.parquet")
    (folder / "validation-00000-of-00001.jsonl").write_text(json.dumps(MIXED[0]))
    assert rows(load_data(tmp_path, tokenizer, 99)) == rows(load_data(folder, tokenizer, 99)) == wanted
    assert rows(load_data(tmp_path, tokenizer, 99, name="validation-file")) == wanted[:1]
    first = folder / f"train-00000-of-00003{end}.parquet"
    assert rows(load_data(first, tokenizer, 99)) == wanted[:300]  # a shard that is named is meant alone
    (folder / "valid-00000-of-00001.jsonl").touch()
    with pytest.raises(ValueError, match=r"has valid-\*-of-00001.jsonl and validation-\*-of-00001.jsonl in"):
        check_source(tmp_path, "validation-file")
    (folder / f"train-00001-of-00003{end}.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="train-file .*train-00001-of-00003.*: cannot be read as parquet"):
        load_data(tmp_path, tokenizer, 99)
    (folder / "train-00002-of-00003-ff.parquet").touch()
    with pytest.raises(ValueError, match="has train-00002-of-00003.*parquet and train-00002-of-00003.*; leave one"):
        check_source(tmp_path)
    (folder / "train-00002-of-00003-ff.parquet").unlink()
    (folder / "train-00000-of-99999999999999.json").touch()  # no number is counted up to
    with pytest.raises(ValueError, match=r"and train-\*-of-99999999999999.json|train-\*-of-99999999999999.json and"):
        check_source(tmp_path)
    (folder / "train-00000-of-99999999999999.json").unlink()
    first.unlink()
    with pytest.raises(ValueError, match=r"has 2 of the 3 files train-\*-of-00003.parquet in .* of number 0 is miss"):
        check_source(tmp_path)


def test_compressed_files(tokenizer, tmp_path):
    content = json.dumps({"text": "a cat"})
    packed = tmp_path / "data" / "train.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(content.encode()))
    with pytest.raises(ValueError, match="train.jsonl.gz: is compressed; unpack it, and give a .txt,"):
        check_source(packed)
    with pytest.raises(ValueError, match="is a directory with data/train.jsonl.gz, which is compressed; unpack it"):
        check_source(tmp_path)
    (packed.parent / "train.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    assert len(load_data(tmp_path, tokenizer, 99)) == 1


def test_missing_file_and_directory(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="train-file .*gone.txt: no such file"):
        load_data(tmp_path / "gone.txt", tokenizer, 8)
    with pytest.raises(
        ValueError,
        match="is a directory and no saved dataset, without train.txt or train.jsonl or train.json or train.csv or",
    ):
        load_data(str(tmp_path), tokenizer, 8)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="is a special file"):
        load_data(tmp_path / "pipe.txt", tokenizer, 8)


def test_a_broken_parquet_file(tokenizer, tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a cat " * 50}] * 500), path, compression=None)
    content = path.read_bytes()
    for broken in (b"", content[:100], content[:-20], b"\0" * 500 + content[500:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="train-file .*x.parquet: cannot be read as parquet") as error:
            load_data(path, tokenizer, 99)
        assert "\n" not in str(error.value)


def test_a_broken_saved_dataset(tokenizer, tmp_path):
    datasets.Dataset.from_list([{"text": "a cat " * 50}] * 50).save_to_disk(tmp_path / "x")
    (arrow,) = (tmp_path / "x").glob("*.arrow")
    content = arrow.read_bytes()
    for broken in (content[:100], None):
        arrow.write_bytes(broken) if broken else arrow.unlink()
        with pytest.raises(ValueError, match="train-file .*x: cannot be read as a saved dataset") as error:
            load_data(tmp_path / "x", tokenizer, 99)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row, message", [({"title": "a"}, r"unknown row, with the keys \['title'\]"), ({"text": 5}, "int 5")]
)
def test_a_wrong_row_is_named(tokenizer, tmp_path, row, message):
    table = pyarrow.Table.from_pylist([row] * 3)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "x")
    for path in ("x.parquet", "x"):
        with pytest.raises(ValueError, match=f"train-file .*{path}:1: .*{message}"):
            load_data(tmp_path / path, tokenizer, 99)


@pytest.mark.parametrize("change", [{"type": "numpy"}, {"type": "torch"}, {"columns": ["number"]}], ids=str)
def test_the_format_that_a_dataset_was_saved_with_is_no_matter(tokenizer, tmp_path, change):
    plain = datasets.Dataset.from_list([{"text": "a cat " * place, "number": place} for place in (3, 4)])
    plain.save_to_disk(tmp_path / "plain")
    plain.with_format(**change).save_to_disk(tmp_path / "changed")
    found = [rows(load_data(tmp_path / name, tokenizer, 99)) for name in ("plain", "changed")]
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_what_is_not_installed_is_named(tokenizer, tmp_path, monkeypatch, package):
    table = pyarrow.Table.from_pylist([{"text": "The cat"}])
    pyarrow.parquet.write_table(table, tmp_path / "pyarrow.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "datasets")
    path = tmp_path / ("pyarrow.parquet" if package == "pyarrow" else "datasets")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the {package} package; pip install 'mebp-triton\[datasets\]'"):
        load_data(path, tokenizer, 99)


def test_a_key_twice_in_a_row(tokenizer, write):
    path = write("x.jsonl", '{"text": "a b c"}\n{"text": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match="x.jsonl:2: broken JSON .*'text' stands twice"):
        load_data(path, tokenizer, 99)


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/hostname", "gone.arrow", 7, None])
def test_a_saved_dataset_names_its_own_files(tokenizer, tmp_path, name):
    datasets.Dataset.from_list([{"text": "a cat"}]).save_to_disk(tmp_path / "x")
    (tmp_path / "x.arrow").write_bytes(next((tmp_path / "x").glob("*.arrow")).read_bytes())
    state = json.loads((tmp_path / "x" / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "x" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="cannot be read as a saved dataset .*no file of this directory"):
        load_data(tmp_path / "x", tokenizer, 99)


def test_a_bent_offset_is_not_followed_out_of_the_file(tokenizer, tmp_path):
    """Arrow trusts the offsets of its strings: a bent one would read past the mapping."""
    datasets.Dataset.from_list([{"text": f"a cat {n}"} for n in range(50)]).save_to_disk(tmp_path / "x")
    (arrow,) = (tmp_path / "x").glob("*.arrow")
    data = bytearray(arrow.read_bytes())
    lengths, end = [], 0
    for n in range(50):
        end += len(f"a cat {n}")
        lengths.append(end.to_bytes(4, "little"))
    place = data.find(b"".join(lengths[:8]))
    assert place > 0
    data[place + 12 : place + 16] = (1 << 30).to_bytes(4, "little")
    arrow.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read as a saved dataset"):
        load_data(tmp_path / "x", tokenizer, 99)
