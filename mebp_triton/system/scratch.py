"""Temporary files without a name, used in slots or as flat arrays. The system removes them with the process."""

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

from .atomic import path_in_errors
from .errors import FileError
from .reading import raw_bytes, read_fully
from .temporaries import temporary_prefix


class ScratchFile:
    """A temporary file without a name, used in slots.

    Slots are allocated when they are made, so a full disk is an ``OSError`` then, and never a SIGBUS at a later write.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.what = f"a scratch file in {directory}"
        with path_in_errors(self.what):
            self._file = tempfile.TemporaryFile(prefix=temporary_prefix(), dir=directory)  # noqa: SIM115
        self.end = 0

    def slot(self, size: int) -> Slot:
        """Makes a slot of ``size`` bytes."""
        length = -(-max(size, 1) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with path_in_errors(self.what):
            os.posix_fallocate(self._file.fileno(), self.end, length)
        slot = Slot(self._file.fileno(), self.end, size)
        self.end += length
        return slot

    def mapped_slot(self, size: int) -> MappedSlot:
        """Makes a slot of ``size`` zero bytes, and maps it."""
        slot = self.slot(size)
        length = self.end - slot.offset
        with path_in_errors(self.what):  # the address space may be limited
            return MappedSlot(mmap.mmap(self._file.fileno(), length, offset=slot.offset), size)


class Slot:
    """A stretch of a ``ScratchFile`` that is read and written by calls: none of it is resident memory of the process.

    It can be used as long as its ``ScratchFile`` exists.
    """

    def __init__(self, handle: int, offset: int, size: int) -> None:
        self._handle, self.offset, self.size = handle, offset, size

    def write(self, tensor: Tensor) -> None:
        """Writes the bytes of a contiguous CPU tensor, from the slot's start on."""
        view, done = raw_bytes(tensor), 0
        with path_in_errors("a scratch file"):
            while done < len(view):
                done += os.pwrite(self._handle, view[done:], self.offset + done)

    def read(self, tensor: Tensor) -> None:
        """Fills a contiguous CPU tensor from the slot's start on."""
        read_fully(self._handle, raw_bytes(tensor), self.offset, "a scratch file")


class ScratchArray:
    """A flat array in a temporary file without a name: written once from start to end, read by slices.

    None of it is resident memory, but for what waits to be written.

    Args:
        directory: an existing directory for the file.
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
        array = np.empty(max(stop - start, 0), self.dtype)
        read_fully(self._file.fileno(), array.view(np.uint8).data, start * self.dtype.itemsize, "a scratch file")
        return array

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """While active, an ``OSError`` becomes a ``FileError`` that names the directory."""
        try:
            yield
        except OSError as error:
            raise FileError(f"cannot write a scratch file in {self.directory}: {error.strerror}") from error


class MappedSlot:
    """A mapped stretch of a ``ScratchFile``: ``bytes`` is a writable uint8 tensor over it."""

    def __init__(self, mapping: mmap.mmap, size: int) -> None:
        self._map, self.size = mapping, size
        self.bytes: Tensor = torch.frombuffer(mapping, dtype=torch.uint8)[:size]

    def drop(self) -> None:
        """Gives the resident pages back; what was written stays in the file."""
        self._map.madvise(mmap.MADV_DONTNEED)
