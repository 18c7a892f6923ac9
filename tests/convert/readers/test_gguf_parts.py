"""A model in several GGUF files is found by any of them, or refused by one line."""

import os
import shutil
import struct

import pytest

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

from gguf_bytes import content, pair, tensor  # noqa: E402
from gguf_files import llama_tensors, write  # noqa: E402

from mebp_triton.convert.readers.gguf_header import read_header  # noqa: E402
from mebp_triton.convert.readers.gguf_parts import read_model  # noqa: E402


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Three parts that tests only read, and the same model as one file."""
    folder = tmp_path_factory.mktemp("split")
    write(folder / "tiny.gguf", "llama", llama_tensors(), tensors_each=8)
    write(folder / "whole.gguf", "llama", llama_tensors())
    assert sorted(path.name for path in folder.iterdir()) == [*(name(part) for part in (1, 2, 3)), "whole.gguf"]
    return folder


def name(part, count=3):
    return f"tiny-{part:05d}-of-{count:05d}.gguf"


@pytest.fixture
def parts(split, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(split, tmp_path / "copy")


def bytes_of(entry):
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        return entry.kind, entry.shape, file.read(entry.nbytes)


@pytest.mark.parametrize("part", [1, 2, 3])
def test_any_part_stands_for_the_model(split, part):
    model, whole = read_model(split / name(part)), read_model(split / "whole.gguf")
    assert model.path == split / name(1)
    ours = {key: value for key, value in model.metadata.items() if not key.startswith("split.")}
    assert ours == whole.metadata
    assert model.tensors.keys() == whole.tensors.keys()
    for key, entry in model.tensors.items():
        assert bytes_of(entry) == bytes_of(whole.tensors[key]), key
    assert {entry.path for entry in model.tensors.values()} == {split / name(each) for each in (1, 2, 3)}


def test_a_first_part_without_tensors(tmp_path):
    """``gguf-split --no-tensor-first-split`` writes such."""
    (tmp_path / name(1, 2)).write_bytes(content(numbers(0, 2, 1)))
    (tmp_path / name(2, 2)).write_bytes(content(numbers(1, 2, 1), [tensor("a", (2,))], 8))
    assert list(read_model(tmp_path / name(1, 2)).tensors) == ["a"]


@pytest.mark.parametrize("count", [0, 1])
def test_one_part_is_a_whole_model(tmp_path, count):
    (tmp_path / "x.gguf").write_bytes(content(numbers(0, count, 1), [tensor("a", (2,))], 8))
    assert read_model(tmp_path / "x.gguf") == read_header(tmp_path / "x.gguf")


def numbers(number, count, total):
    values = {"split.no": number, "split.count": count, "split.tensors.count": total}
    return [pair(key, 4, struct.pack("<I", value)) for key, value in values.items()]


def assert_refused(path, *words):
    with pytest.raises(ValueError) as caught:
        read_model(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(("missing", "given"), [(1, 2), (3, 1), (2, 3)])
def test_a_missing_part_is_named(parts, missing, given):
    (parts / name(missing)).unlink()
    assert_refused(
        parts / name(given), f"is part {given} of 3, but beside it is no {name(missing)}", "download all parts"
    )


def test_a_part_that_is_no_file(parts):
    (parts / name(3)).unlink()
    os.mkfifo(parts / name(3))
    assert_refused(parts / name(1), f"beside it is no {name(3)}")


def test_a_part_under_another_name(parts):
    (parts / name(2)).rename(parts / "second.gguf")
    assert_refused(parts / "second.gguf", "is part 2 of 3, and its name must end with -00002-of-00003.gguf")
    assert_refused(parts / name(1), f"no {name(2)}")


def test_a_part_too_many(parts):
    shutil.copy(parts / name(3), parts / name(4))
    assert_refused(parts / name(1), f"{name(4)} cannot be one of 3 parts")


def test_parts_in_each_others_place(parts):
    (parts / name(2)).rename(parts / "x")
    (parts / name(3)).rename(parts / name(2))
    (parts / "x").rename(parts / name(3))
    assert_refused(parts / name(1), f"{name(2)} is not part 2 of 3 of this model: split.no is 2, not 1")


FOREIGN = {
    "another count": (numbers(1, 4, 20), "split.count is 4, not 3"),
    "another number of tensors": (numbers(1, 3, 21), "split.tensors.count is 21, not 20"),
    "a whole model": ([], "split.no is None, not 1"),
    "another architecture": (
        [*numbers(1, 3, 20), pair("general.architecture", 8, struct.pack("<Q", 4) + b"gpt2")],
        "general.architecture is 'gpt2', not 'llama'",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_part_of_another_model(parts, case):
    pairs, message = FOREIGN[case]
    (parts / name(2)).write_bytes(content(pairs, [tensor("a", (2,))], 8))
    assert_refused(parts / name(1), f"{name(2)} is not part 2 of 3 of this model: {message}", "download all parts")


def test_a_part_with_tensors_of_others(parts):
    (parts / name(2)).write_bytes(content(numbers(1, 3, 20), [tensor("token_embd.weight", (2,))], 8))
    assert_refused(parts / name(3), f"{name(1)} and ", f"{name(2)} both have token_embd.weight")


def test_a_part_that_lacks_tensors(parts):
    (parts / name(2)).write_bytes(content(numbers(1, 3, 20), [tensor("a", (2,))], 8))
    assert_refused(parts / name(1), f"{name(1)}: split.tensors.count is 20, its parts have ")


@pytest.mark.parametrize(("number", "count"), [(3, 3), (0, 70000)])
def test_damaged_numbers(tmp_path, number, count):
    (tmp_path / name(1)).write_bytes(content(numbers(number, count, 1)))
    assert_refused(tmp_path / name(1), f"split.no is {number} of {count}", "download it again")


def test_numbers_of_other_kinds(tmp_path):
    pairs = [pair("split.count", 8, struct.pack("<Q", 1) + b"3")]
    (tmp_path / name(1)).write_bytes(content(pairs))
    assert_refused(tmp_path / name(1), "split.no is None of '3'")


def test_a_damaged_part_is_named(parts):
    (parts / name(2)).write_bytes((parts / name(2)).read_bytes()[:-40])
    assert_refused(parts / name(1), f"{name(2)} is truncated")
