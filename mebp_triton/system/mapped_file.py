"""Files mapped read-only, whose pages can be dropped from resident memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import FileError
from .reading import CHECKSUM_CHUNK, check_regular, raw_bytes, read_fully
from .safetensors_file import TensorEntry, safetensors_header

MADV_POPULATE_READ = 22  # Linux; Python has no name for it


class MappedFile:
    """A file mapped read-only, whose pages can be dropped from resident memory.

    Args:
        path: a regular file of exactly ``size`` bytes, which must not shrink while it is mapped: ``check`` sees
            that it has not, so that a truncated file is an error message instead of a SIGBUS.
    """

    opened: weakref.WeakSet[MappedFile] = weakref.WeakSet()

    def __init__(self, path: Path, size: int) -> None:
        check_regular(path)
        self.path, self.size = path, size
        self._file = open(path, "rb")  # noqa: SIM115 - lives as long as the mapping
        self.check()
        # A private mapping: torch wants a writable buffer, and nothing written here could reach the file.
        self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY)
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.opened.add(self)

    def is_cut_short(self) -> bool:
        return os.fstat(self._file.fileno()).st_size < self.size

    def check(self) -> None:
        found = os.fstat(self._file.fileno()).st_size
        if found != self.size:
            raise FileError(f"{self.path} has {found} bytes and should have {self.size}: it was cut short or changed")

    def header(self, dtypes: Mapping[str, torch.dtype]) -> tuple[int, dict[str, TensorEntry]]:
        """Start of the data section and the tensors of a safetensors file, see ``safetensors_header``."""
        return safetensors_header(self.path, self._file.fileno(), self.size, dtypes)[:2]

    def checksums(self) -> list[int]:
        """``checksums`` of the file, by reading: no page of the mapping becomes resident."""
        buffer, found = memoryview(bytearray(CHECKSUM_CHUNK)), []
        for start in range(0, self.size, CHECKSUM_CHUNK):
            chunk = buffer[: min(CHECKSUM_CHUNK, self.size - start)]
            read_fully(self._file.fileno(), chunk, start, self.path)
            found.append(zlib.crc32(chunk))
        return found

    def read(self, tensor: Tensor, start: int) -> None:
        """Fills a contiguous CPU tensor with the bytes from ``start`` on, without the mapping."""
        read_fully(self._file.fileno(), raw_bytes(tensor), start, self.path)

    def read_ahead(self, start: int = 0, stop: int | None = None) -> None:
        """Asks the system to have these bytes in its cache soon; returns at once. Resident memory does not grow."""
        length = (self.size if stop is None else stop) - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def populate(self, start: int = 0, stop: int | None = None) -> None:
        """Makes the pages of these bytes resident in one call, which costs far less than a page fault each."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        last = self.size if stop is None else stop
        with contextlib.suppress(OSError):  # Linux before 5.14 does not know it: then they come one by one
            self._map.madvise(MADV_POPULATE_READ, first, last - first)

    def drop(self, start: int = 0, stop: int | None = None) -> None:
        """Gives the resident pages back, or those that lie within ``start:stop``; the next access reads them again."""
        page = mmap.PAGESIZE
        first = -(-start // page) * page
        last = self.size if stop is None else stop // page * page
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
