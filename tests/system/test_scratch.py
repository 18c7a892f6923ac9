"""Scratch files: separate slots, really allocated, without a name; arrays that are what was appended."""

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mebp_triton.system.errors import FileError
from mebp_triton.system.scratch import ScratchArray, ScratchFile


def test_scratch_slots_are_separate_zero_and_survive_drop(tmp_path):
    scratch = ScratchFile(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == [], "a scratch file has a name, so it would outlive the process"
    sizes = [1, 4096, 5000, 0, 3 * mmap.ALLOCATIONGRANULARITY]
    slots = [scratch.mapped_slot(size) for size in sizes]
    for number, (slot, size) in enumerate(zip(slots, sizes, strict=True)):
        assert slot.bytes.dtype == torch.uint8 and slot.bytes.shape == (size,)
        assert not slot.bytes.any()
        slot.bytes.fill_(number + 1)
        slot.drop()
    for number, slot in enumerate(slots):
        assert (slot.bytes == number + 1).all()


def test_what_is_written_to_a_slot_is_read_from_it(tmp_path, monkeypatch):
    scratch = ScratchFile(tmp_path)
    tensors = [torch.randn(37), torch.randn(3, 5).bfloat16(), torch.arange(9000, dtype=torch.uint8), torch.zeros(0)]
    slots = [scratch.slot(tensor.nbytes) for tensor in tensors]
    real_write, real_read = os.pwrite, os.preadv
    # The system may write and read less than it was asked to.
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real_write(handle, data[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda handle, views, offset: real_read(handle, [views[0][:700]], offset))
    for slot, tensor in zip(slots, tensors, strict=True):
        slot.write(tensor)
    for slot, tensor in zip(slots, tensors, strict=True):
        found = torch.empty_like(tensor)
        slot.read(found)
        assert torch.equal(found, tensor)
    with pytest.raises(FileError, match="ended"):
        slots[-1].read(torch.zeros(1 << 20))


def test_a_full_disk_is_an_error_when_the_slot_is_made(tmp_path, monkeypatch):
    scratch = ScratchFile(tmp_path)
    slot = scratch.mapped_slot(10)
    taken = []

    def no_space(handle, offset, length):
        taken.append((offset, length))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(OSError, match="No space"):
            scratch.slot(5000)
    page = mmap.ALLOCATIONGRANULARITY
    assert taken == [(page, -(-5000 // page) * page)]
    scratch.mapped_slot(5000).bytes.fill_(7)  # the failed one left no hole
    assert not slot.bytes.any()


def test_slots_are_really_allocated(tmp_path):
    scratch = ScratchFile(tmp_path)
    scratch.slot(1 << 20)
    # The file has no name, so it is found among the files that this process has open.
    (file,) = (link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(link))
    assert os.stat(file).st_blocks * 512 >= 1 << 20, "a sparse map dies of SIGBUS on a full disk"


def test_a_scratch_array_is_what_was_appended(tmp_path, monkeypatch):
    made = ScratchArray(tmp_path, np.int32)
    whole = np.arange(200_000, dtype=np.int32)
    for start in range(0, len(whole), 777):
        made.extend(whole[start : start + 777])
        assert (made[start : start + 5] == whole[start : start + 5]).all()  # what was not written yet is read too
    assert list(tmp_path.iterdir()) == [], "a scratch file has a name, so it would outlive the process"
    real_read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, views, offset: real_read(handle, [views[0][:700]], offset))
    assert len(made) == len(whole) and made[:].dtype == np.int32
    for where in (slice(None), slice(3, 9), slice(199_990, 300_000), slice(7, 7)):
        assert (made[where] == whole[where]).all() and len(made[where]) == len(whole[where])
    truths = ScratchArray(tmp_path, np.bool_)
    truths.extend(b"\1\0\1")
    assert truths[1:].tolist() == [False, True]


def test_a_scratch_array_on_a_full_disk_is_one_line(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: open("/dev/full", "wb"))  # noqa: SIM115
    made = ScratchArray(Path("/tmp"), np.int32)
    with pytest.raises(FileError, match="cannot write a scratch file in /tmp: No space left"):
        made.extend(bytes(1 << 20))
