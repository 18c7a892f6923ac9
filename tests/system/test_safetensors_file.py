"""safetensors files: the same bytes every time, readable by others, and refused where the header is wrong."""

import os

import pytest
import safetensors.torch
import torch
from faults import full

from mebp_triton.system.errors import FileError
from mebp_triton.system.safetensors_file import (
    read_safetensors,
    read_safetensors_header,
    tensors_checksum,
    write_safetensors,
    write_safetensors_pieces,
)

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    "rng": torch.arange(5, dtype=torch.uint8),
    "lag": torch.tensor(3),
    "none": torch.zeros(0, 4),
}


def test_tensors_are_written_the_same_every_time_and_read_by_others(tmp_path):
    metadata = {"format": "pt", "z": "1", "a": "2"}
    for name in ("x", "y"):
        write_safetensors(tmp_path / name, dict(reversed(TENSORS.items())), metadata)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    ours, found = read_safetensors(tmp_path / "x")
    theirs = safetensors.torch.load_file(tmp_path / "x")
    assert found == metadata and ours.keys() == theirs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(ours[name], tensor) and torch.equal(theirs[name], tensor)
        assert ours[name].dtype == theirs[name].dtype == tensor.dtype
    assert read_safetensors_header(tmp_path / "x")[0]["b"][:2] == (torch.float32, (2, 3))
    safetensors.torch.save_file(TENSORS, tmp_path / "z")
    again, _ = read_safetensors(tmp_path / "z")
    assert tensors_checksum(again) == tensors_checksum(ours)
    again["b"][1, 1] += 1
    assert tensors_checksum(again) != tensors_checksum(ours)


@pytest.mark.parametrize("metadata", ["[]", '{"a": 1}', '"x"'])
def test_metadata_is_texts(tmp_path, metadata):
    header = f'{{"__metadata__": {metadata}}}'.encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match="metadata"):
        read_safetensors(tmp_path / "x")


def test_a_failed_write_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_safetensors(tmp_path / "x.safetensors", TENSORS)
    assert caught.value.filename == str(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_pieces_must_be_what_was_announced(tmp_path):
    entries = {"a": ("F32", (2, 2), 16)}
    write_safetensors_pieces(tmp_path / "x", entries, [torch.tensor([1.0]), torch.tensor([2.0, 3.0, 4.0])])
    assert safetensors.torch.load_file(tmp_path / "x")["a"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(RuntimeError, match="4 bytes of data were written, 16 announced"):
        write_safetensors_pieces(tmp_path / "y", entries, [torch.tensor([1.0])])
    assert not (tmp_path / "y").exists()


def test_a_header_longer_than_any_real_one_is_refused_before_it_is_parsed(tmp_path):
    length = (1 << 26) + 8
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little"))
    os.truncate(tmp_path / "x", length + 100)
    with pytest.raises(FileError, match=f"header length {length} does not fit"):
        read_safetensors(tmp_path / "x")
