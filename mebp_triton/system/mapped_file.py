"""Files mapped read-only, whose pages can be dropped from resident memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import FileError
from .reading import CHECKSUM_CHUNK, check_regular, raw_bytes, read_fully
from .safetensors_file import TensorEntry, safetensors_header

MADV_POPULATE_READ = 22  # Linux; Python has no name for it


class MappedFile:
    """A file mapped read-only, whose pages can be dropped from resident memory.

    A read of a page beyond the file's end is a SIGBUS, to which no exception answers. So users call ``check`` before
    they read: a file that was cut short is an error message then.

    Args:
        path: a regular file of exactly ``size`` bytes.

    Attributes:
        bytes: the file as a uint8 tensor.
        kept: whether pages stay resident once they are: ``drop`` does nothing, and what was made resident or read
            ahead is not asked for again. The system may still take clean pages back where memory is short.
        opened: all mapped files of this process.
    """

    opened: weakref.WeakSet[MappedFile] = weakref.WeakSet()

    def __init__(self, path: Path, size: int) -> None:
        check_regular(path)
        self.path, self.size, self.kept = path, size, False
        self._asked: set[tuple[str, int, int | None]] = set()
        self._file = open(path, "rb")  # noqa: SIM115 - lives as long as the mapping
        self.check()
        # Private, since torch wants a writable buffer: what is written there cannot reach the file.
        self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY)
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.opened.add(self)

    def is_cut_short(self) -> bool:
        """Whether the file has shrunk since it was mapped."""
        return os.fstat(self._file.fileno()).st_size < self.size

    def check(self) -> None:
        """Raises FileError where the file has another size now."""
        size = os.fstat(self._file.fileno()).st_size
        if size != self.size:
            raise FileError(f"{self.path} has {size} bytes and should have {self.size}: it was cut short or changed")

    def header(self, dtypes: Mapping[str, torch.dtype]) -> tuple[int, dict[str, TensorEntry]]:
        """Where the data section of a safetensors file starts, and its tensors; see ``safetensors_header``."""
        return safetensors_header(self.path, self._file.fileno(), self.size, dtypes)[:2]

    def checksums(self, chunks: Iterable[int] | None = None) -> Iterator[int]:
        """The ``checksums`` of the file's chunks, or of some by their numbers, by calls that read.

        No page of the mapping becomes resident.
        """
        buffer = memoryview(bytearray(CHECKSUM_CHUNK))
        for chunk in range(-(-self.size // CHECKSUM_CHUNK)) if chunks is None else chunks:
            start = chunk * CHECKSUM_CHUNK
            view = buffer[: min(CHECKSUM_CHUNK, self.size - start)]
            read_fully(self._file.fileno(), view, start, self.path)
            yield zlib.crc32(view)

    def read(self, tensor: Tensor, start: int) -> None:
        """Fills a contiguous CPU tensor with the bytes from ``start`` on, without touching the mapping."""
        read_fully(self._file.fileno(), raw_bytes(tensor), start, self.path)

    def read_ahead(self, start: int = 0, stop: int | None = None) -> None:
        """Asks the system to have these bytes in its cache soon; returns at once. Resident memory does not grow."""
        if self._has("read_ahead", start, stop):
            return
        length = (self.size if stop is None else stop) - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def populate(self, start: int = 0, stop: int | None = None) -> None:
        """Makes the pages of these bytes resident in one call, which costs far less than a page fault each."""
        if self._has("populate", start, stop):
            return
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        last = self.size if stop is None else stop
        with contextlib.suppress(OSError):  # Linux before 5.14 lacks it: there pages come one by one as they are read
            self._map.madvise(MADV_POPULATE_READ, first, last - first)

    def drop(self, start: int = 0, stop: int | None = None) -> None:
        """Gives resident pages back, all or those that lie within ``start:stop``; the next access reads them again."""
        if self.kept:
            return
        page = mmap.PAGESIZE
        first = -(-start // page) * page
        last = self.size if stop is None else stop // page * page
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _has(self, what: str, start: int, stop: int | None) -> bool:
        """Whether pages are kept, and just this was asked for before."""
        if not self.kept:
            return False
        known = (what, start, stop) in self._asked
        self._asked.add((what, start, stop))
        return known
