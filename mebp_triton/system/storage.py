"""Swap, file systems, and the speed of storage."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import atomic, temporaries
from .machine import ROOT, read_text
from .units import MB


@dataclass(frozen=True)
class Swap:
    """One area of swap, in bytes."""

    name: str
    size: int
    used: int

    @property
    def compressed(self) -> bool:
        """Whether it lies in memory itself (zram)."""
        return "zram" in self.name


def swaps(root: Path = ROOT) -> list[Swap]:
    """Reads the areas in ``/proc/swaps``."""
    rows = [line.split() for line in read_text(root / "proc/swaps").splitlines()[1:]]
    return [Swap(row[0], int(row[2]) * 1024, int(row[3]) * 1024) for row in rows if len(row) >= 4]


@dataclass(frozen=True)
class Mount:
    """A file system: where it is mounted, its type, and its device, "" if unknown."""

    point: str
    kind: str
    device: str

    @property
    def in_memory(self) -> bool:
        return self.kind in ("tmpfs", "ramfs")

    @property
    def is_card(self) -> bool:
        """Whether it lies on an SD card or eMMC."""
        return self.device.startswith("/dev/mmcblk")


def mount_of(path: Path, root: Path = ROOT) -> Mount:
    """Finds the file system that holds ``path`` in ``/proc/self/mounts``; all is "" where there is no such file."""
    target, deepest = path.resolve(), Mount("", "", "")
    for line in read_text(root / "proc/self/mounts").splitlines():
        device, point, kind = [word.replace("\\040", " ") for word in line.split(" ")[:3]]
        if target.is_relative_to(point) and len(point) >= len(deepest.point):  # a later mount covers an earlier one
            deepest = Mount(point, kind, device)
    return deepest


@dataclass(frozen=True)
class Speed:
    """The speed of storage in bytes per second; ``write`` is None where nothing was written.

    Attributes:
        from_cache: whether the read came from the page cache; None where the system does not tell.
    """

    read: float
    write: float | None
    from_cache: bool | None

    def __str__(self) -> str:
        cached = {True: " (from the page cache)", False: "", None: " (may be from the page cache)"}[self.from_cache]
        written = "" if self.write is None else f"write {self.write / MB:.0f} MB/s, "
        return f"{written}read {self.read / MB:.0f} MB/s{cached}"


PIECES = (4 << 20, 12 << 20, 48 << 20)
SECONDS = 1.0


def scratch_speed(directory: Path) -> Speed:
    """Writes up to 64 MiB in growing pieces, each synced, drops the last one from the page cache, and reads it back.

    No piece is begun that would take longer than a second. OSError where nothing can be written.
    """
    with tempfile.TemporaryDirectory(prefix=temporaries.TEMPORARY_PREFIX, dir=directory) as place:
        path, rate = Path(place) / "speed", 0.0
        for size in PIECES:
            if rate and size / rate > SECONDS:
                break
            data = os.urandom(size)  # a compressing file system cannot shrink it
            start = time.perf_counter()
            atomic.write_bytes(path, data)
            rate = size / max(time.perf_counter() - start, 1e-9)
        read = read_speed(path)
    return Speed(read.read, rate, read.from_cache)


def read_speed(path: Path, limit: int = 64 << 20, root: Path = ROOT) -> Speed:
    """Drops a file from the page cache, and reads up to ``limit`` bytes for up to a second. OSError if it cannot."""
    buffer, done = bytearray(1 << 20), 0
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before, start = _fetched(root), time.perf_counter()
        while done < limit and time.perf_counter() - start < SECONDS and (count := file.readinto(buffer)):
            done += count
        seconds, after = time.perf_counter() - start, _fetched(root)
    from_cache = None if before is None or after is None else after - before < done // 2
    return Speed(done / max(seconds, 1e-9), None, from_cache)


def _fetched(root: Path) -> int | None:
    """Bytes that this process has had fetched from storage so far; None where the system does not tell."""
    for line in read_text(root / "proc/self/io").splitlines():
        if line.startswith("read_bytes: "):
            return int(line.removeprefix("read_bytes: "))
    return None
