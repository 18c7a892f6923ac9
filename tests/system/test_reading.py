"""Reads that end too early, files that are none, and checksums."""

import os
import zlib

import pytest
import torch

from mebp_triton.system.errors import FileError
from mebp_triton.system.mapped_file import MappedFile
from mebp_triton.system.reading import (
    CHECKSUM_CHUNK,
    check_regular,
    checksums,
    file_checksums,
    joint_checksum,
    raw_bytes,
    read_bytes,
    read_fully,
)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, problem in (
        ("fifo", "not a regular file"),
        (".", "not a regular file"),
        ("nothing", "does not exist"),
        ("file/below", "does not exist"),
        ("dangling", "does not exist"),
    ):
        for use in (read_bytes, file_checksums, check_regular, lambda path: MappedFile(path, 1)):
            with pytest.raises(FileError, match=problem):
                use(tmp_path / name)  # a FIFO would block for ever


def test_a_huge_file_is_not_read(tmp_path):
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    with pytest.raises(FileError, match="more than"):
        read_bytes(tmp_path / "huge")


def test_a_file_that_cannot_be_looked_at_is_a_file_error(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(FileError, match="cannot be read"):
            read_bytes(path)


def test_checksums_are_of_chunks(tmp_path):
    data = bytes(range(256)) * 3
    assert checksums(data, 300) == [zlib.crc32(data[:300]), zlib.crc32(data[300:600]), zlib.crc32(data[600:])]
    assert checksums(b"") == []
    for size in (0, 1, CHECKSUM_CHUNK, CHECKSUM_CHUNK + 1):
        (tmp_path / "file").write_bytes(bytes(size))
        assert file_checksums(tmp_path / "file") == checksums(bytes(size))
        assert len(checksums(bytes(size))) == -(-size // CHECKSUM_CHUNK)


def test_raw_bytes_are_those_of_the_tensor_itself():
    tensor = torch.tensor([1, 258], dtype=torch.int16)
    view = raw_bytes(tensor)
    assert bytes(view) == b"\1\0\2\1"
    view[0] = 7
    assert tensor.tolist() == [7, 258]


def test_a_read_goes_on_until_it_is_full_and_an_early_end_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    real = os.preadv
    # The system may read less than it was asked to.
    monkeypatch.setattr(os, "preadv", lambda handle, views, offset: real(handle, [views[0][:7]], offset))
    with open(tmp_path / "file", "rb") as file:
        buffer = bytearray(60)
        read_fully(file.fileno(), memoryview(buffer), 40, "the file")
        assert buffer == bytes(range(40, 100))
        with pytest.raises(FileError, match="the file ended 1 bytes early"):
            read_fully(file.fileno(), memoryview(buffer), 41, "the file")


def test_several_files_have_one_checksum_whatever_their_names(tmp_path):
    for name, text in (("a", "x"), ("b", "y"), ("c", "x")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert joint_checksum([a, b]) == joint_checksum([c, b])
    assert len({joint_checksum(paths) for paths in ([a], [a, b], [b, a], [a, c])}) == 4
