"""The resident memory of this process: how much there is, of which kind, and what malloc keeps of freed memory."""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE = 1 << 20


def return_large_freed_memory() -> bool:
    """Lets every allocation of a MiB or more come from the system, and go back to it as soon as it is freed.

    By itself glibc raises that limit to the size of the largest block that was freed, up to 32 MiB. From then on
    activations lie in its heap, and the gaps between them keep the heap large. In return, each new page costs a fault.

    Returns:
        Whether the C library is a glibc, which can be told so. It holds until the process ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE))


def return_free_memory() -> None:
    """Gives the free memory that malloc holds back to the system, once. Nothing happens without glibc."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)


def page_dropper(tensor: Tensor) -> Callable[[Tensor], None] | None:
    """Finds out whether ``tensor`` lies in a file that is mapped privately, as safetensors maps a file.

    Returns:
        What gives the resident pages of a contiguous part of ``tensor`` back to the system. They must not have been
        written to: the next access reads them from the file again. None for memory of another kind.
    """
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    try:
        madvise = ctypes.CDLL(None).madvise
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            mappings = [line.split(maxsplit=5) for line in file]
    except (OSError, AttributeError):
        return None
    for bounds, permissions, _, _, inode, *_ in mappings:
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if first <= start and stop <= last:
            if inode == "0" or not permissions.endswith("p"):
                return None
            break
    else:
        return None

    def drop(part: Tensor) -> None:
        page = mmap.PAGESIZE
        first = -(-part.data_ptr() // page) * page
        last = (part.data_ptr() + part.nbytes) // page * page
        if last > first:
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)

    return drop


@dataclass(frozen=True)
class Resident:
    """Resident bytes of this process: anonymous, and file-backed (mapped files and shared memory)."""

    anonymous: int
    file_backed: int

    @property
    def total(self) -> int:
        return self.anonymous + self.file_backed


def resident() -> Resident:
    """Reads the present sizes from ``/proc/self/status``. Without that file, all of the peak counts as anonymous."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
    except FileNotFoundError:
        return Resident(peak_resident_bytes(), 0)
    kib = {key: int(lines[key].split()[0]) for key in ("RssAnon", "RssFile", "RssShmem")}
    return Resident(kib["RssAnon"] * 1024, (kib["RssFile"] + kib["RssShmem"]) * 1024)


def peak_resident_bytes() -> int:
    """The highest resident set of this process so far."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class MemoryWatch:
    """Samples memory at events (a block's forward or backward) and keeps the peaks.

    Attributes:
        peak_anonymous: the most anonymous bytes at any event.
        timeline: (seconds, event, block, anonymous, file-backed, device bytes) of every event.
    """

    device: torch.device
    peak_anonymous: int = 0
    timeline: list[tuple[float, str, int, int, int, int]] = field(default_factory=list)

    def __call__(self, event: str, index: int) -> None:
        now = resident()
        self.peak_anonymous = max(self.peak_anonymous, now.anonymous)
        on_device = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self.timeline.append((time.perf_counter(), event, index, now.anonymous, now.file_backed, on_device))

    def peak_device_bytes(self) -> int | None:
        """The most bytes of tensors on the device so far; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
