"""What malloc does with freed memory: a process's resident set is what it holds, not what is in use."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from dataclasses import dataclass, field

import torch

# Of glibc's malloc.h.
M_MMAP_THRESHOLD = -3
LARGE = 1 << 20


def return_large_freed_memory() -> bool:
    """Lets every allocation of a MiB or more come from the system, and go back to it when it is freed.

    By itself glibc raises that limit to the largest one that was freed, up to 32 MiB; from then on activations lie in
    its heap, which their gaps keep large. Each new page costs a fault.

    Returns:
        Whether there is a glibc that could be told so. It stays so for the process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE))


def return_free_memory() -> None:
    """Gives back to the system what malloc holds and nobody uses, once. Nothing happens where there is no glibc."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)


@dataclass(frozen=True)
class Resident:
    """Resident bytes of this process: anonymous, and file-backed (mapped files and shared memory)."""

    anonymous: int
    file_backed: int

    @property
    def total(self) -> int:
        return self.anonymous + self.file_backed


def resident() -> Resident:
    """Now, from ``/proc/self/status``; on systems without it all of the peak counts as anonymous."""
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
        timeline: while ``recording``, (seconds, event, block, anonymous, file-backed, device bytes) of every event.
    """

    device: torch.device
    peak_anonymous: int = 0
    recording: bool = False
    timeline: list[tuple[float, str, int, int, int, int]] = field(default_factory=list)

    def __call__(self, event: str, index: int) -> None:
        now = resident()
        self.peak_anonymous = max(self.peak_anonymous, now.anonymous)
        if self.recording:
            on_device = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
            self.timeline.append((time.perf_counter(), event, index, now.anonymous, now.file_backed, on_device))

    def peak_device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
