"""Mapped files: what shrank is noticed, what was dropped is read again, and nothing is written."""

import mmap
import os
import zlib
from pathlib import Path

import pytest
import torch

from mebp_triton.system.atomic import write_bytes
from mebp_triton.system.errors import FileError
from mebp_triton.system.mapped_file import MappedFile
from mebp_triton.system.reading import CHECKSUM_CHUNK


@pytest.mark.parametrize("size", [1, 4095, 4097])
def test_a_mapped_file_must_have_its_size(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    with pytest.raises(FileError, match=f"has 4096 bytes and should have {size}"):
        MappedFile(path, size)


def test_a_mapped_file_notices_that_it_shrank(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    mapped = MappedFile(path, 16384)
    mapped.check()
    os.truncate(path, 100)  # reading bytes 4096.. now would end the process
    with pytest.raises(FileError, match="cut short"):
        mapped.check()


def test_a_mapped_file_reads_again_after_drop_and_never_writes(tmp_path):
    path = tmp_path / "file"
    content = os.urandom(3 * mmap.PAGESIZE + 17)
    path.write_bytes(content)
    mapped = MappedFile(path, len(content))
    assert bytes(mapped.bytes.numpy()) == content
    mapped.drop()
    assert bytes(mapped.bytes.numpy()) == content
    mapped.bytes.zero_()
    assert path.read_bytes() == content
    mapped.drop()
    assert bytes(mapped.bytes.numpy()) == content


def test_pages_that_are_kept_stay_resident(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * mmap.PAGESIZE))
    mapped = MappedFile(path, 64 * mmap.PAGESIZE)

    def resident():
        """Kilobytes of the mapping that are resident."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        next(line for line in lines if line.endswith(str(path)))
        return int(next(line for line in lines if line.startswith("Rss:")).split()[1])

    mapped.populate()
    mapped.drop()
    assert resident() == 0
    mapped.kept = True
    mapped.read_ahead()
    mapped.populate()
    mapped.populate()
    mapped.drop()
    mapped.drop(0, 8 * mmap.PAGESIZE)
    assert resident() == 64 * mmap.PAGESIZE // 1024


def test_saving_over_a_mapped_file_leaves_the_map_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a" * 5000)
    mapped = MappedFile(path, 5000)
    write_bytes(path, b"b" * 10)
    assert set(mapped.bytes.tolist()) == {ord("a")}
    mapped.check()


def test_what_is_read_without_the_mapping_is_the_same(tmp_path):
    path = tmp_path / "file"
    content = os.urandom(CHECKSUM_CHUNK + 100)
    path.write_bytes(content)
    mapped = MappedFile(path, len(content))
    checksums = [zlib.crc32(content[:CHECKSUM_CHUNK]), zlib.crc32(content[CHECKSUM_CHUNK:])]
    assert list(mapped.checksums()) == checksums and list(mapped.checksums([1])) == checksums[1:]
    tensor = torch.empty(50, dtype=torch.int16)
    mapped.read(tensor, 7)
    assert tensor.view(torch.uint8).tolist() == list(content[7:107])
    mapped.read_ahead()
    mapped.read_ahead(5, 9)
    with pytest.raises(FileError, match="ended"):
        mapped.read(tensor, len(content) - 99)


def test_what_was_cut_short_is_told_among_all_that_is_open(tmp_path):
    files = []
    for name in ("whole", "cut"):
        (tmp_path / name).write_bytes(bytes(5000))
        files.append(MappedFile(tmp_path / name, 5000))
    os.truncate(tmp_path / "cut", 10)
    ours = MappedFile.opened & set(files)  # files of other tests may still be open
    assert [mapped.path.name for mapped in ours if mapped.is_cut_short()] == ["cut"]
