"""Temporary files without a name, in slots or as flat arrays; they go with the process."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from .atomic import naming
from .errors import FileError
from .reading import raw_bytes, read_fully
from .temporaries import temporary_prefix


class ScratchFile:
    """A temporary file without a name, used in slots; gone with the process.

    Slots are preallocated, so a full disk is a clean ``OSError`` here and never a SIGBUS at a later write.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.what = f"a scratch file in {directory}"
        with naming(self.what):
            self._file = tempfile.TemporaryFile(prefix=temporary_prefix(), dir=directory)  # noqa: SIM115
        self.end = 0

    def slot(self, size: int) -> Slot:
        length = -(-max(size, 1) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with naming(self.what):
            os.posix_fallocate(self._file.fileno(), self.end, length)
        slot = Slot(self._file.fileno(), self.end, size)
        self.end += length
        return slot

    def mapped_slot(self, size: int) -> MappedSlot:
        slot = self.slot(size)
        length = self.end - slot.offset
        with naming(self.what):  # where the address space is limited
            return MappedSlot(mmap.mmap(self._file.fileno(), length, offset=slot.offset), size)


class Slot:
    """A stretch of a ``ScratchFile`` that is read and written by calls: none of it is resident memory of the process.

    The ``ScratchFile`` must live as long.
    """

    def __init__(self, handle: int, offset: int, size: int) -> None:
        self._handle, self.offset, self.size = handle, offset, size

    def write(self, tensor: Tensor) -> None:
        """The bytes of a contiguous CPU tensor, from the slot's start on."""
        view, done = raw_bytes(tensor), 0
        with naming("a scratch file"):
            while done < len(view):
                done += os.pwrite(self._handle, view[done:], self.offset + done)

    def read(self, tensor: Tensor) -> None:
        """Fills a contiguous CPU tensor from the slot's start on."""
        read_fully(self._handle, raw_bytes(tensor), self.offset, "a scratch file")


class ScratchArray:
    """A flat array in a temporary file without a name: written once from start to end, read by slices.

    Gone with the process. None of it is resident memory, but for what waits to be written.

    Args:
        directory: where the file lies; it must exist.
    """

    def __init__(self, directory: Path, dtype: DTypeLike) -> None:
        self.directory, self.dtype, self.length = directory, np.dtype(dtype), 0
        with self._writing():
            self._file = tempfile.TemporaryFile(prefix=temporary_prefix(), dir=directory)  # noqa: SIM115 - lives with self

    def extend(self, values: Any) -> None:
        """Appends the elements of a buffer. FileError where the disk is full."""
        self.length += memoryview(values).nbytes // self.dtype.itemsize
        with self._writing():
            self._file.write(values)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, where: slice) -> NDArray[Any]:
        start, stop, step = where.indices(self.length)
        assert step == 1, "only stretches are read"
        with self._writing():
            self._file.flush()
        found = np.empty(max(stop - start, 0), self.dtype)
        read_fully(self._file.fileno(), found.view(np.uint8).data, start * self.dtype.itemsize, "a scratch file")
        return found

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(f"cannot write a scratch file in {self.directory}: {error.strerror}") from error


class MappedSlot:
    """A writable stretch of a ``ScratchFile``: ``bytes`` is a uint8 tensor over it."""

    def __init__(self, mapping: mmap.mmap, size: int) -> None:
        self._map, self.size = mapping, size
        self.bytes: Tensor = torch.frombuffer(mapping, dtype=torch.uint8)[:size]

    def drop(self) -> None:
        """Gives the resident pages back; what was written stays in the file."""
        self._map.madvise(mmap.MADV_DONTNEED)
