"""What a run takes: the process's resident set, split by kind, and the device's allocator."""

from __future__ import annotations

import errno
import resource
import sys
import time
from dataclasses import dataclass, field

import torch

OUT_OF_MEMORY: tuple[str, ...] = (
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "can't start new thread",
)
OUT_OF_MEMORY += ("bad_alloc", "failed to map segment")


def is_out_of_memory(error: BaseException) -> bool:
    """Python, the system, the loader, and torch on a CPU and a GPU have each their own way to say it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    kinds = (RuntimeError, ImportError)
    said = isinstance(error, kinds) and any(words in str(error) for words in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError)


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
