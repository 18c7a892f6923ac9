"""What the machine has: memory that a run may take, unified memory, swap, and how fast its storage is.

Everything is read from files of the kernel below ``root``, so that another root shows another machine. What a system
does not tell (macOS has no ``/proc``, a container may hide ``/sys``) counts as absent.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from . import files

ROOT = Path("/")


def read_text(path: Path) -> str:
    """A small file of the kernel, or "" where there is none or it may not be read."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace").rstrip("\0\n")
    except OSError:
        return ""


# --- memory ---------------------------------------------------------------------------------------------------------


def meminfo(root: Path = ROOT) -> dict[str, int]:
    """``/proc/meminfo`` in bytes, by its names; empty where there is none."""
    found = {}
    for line in read_text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if unit == "kB" and number.isdigit():
            found[name] = int(number) * 1024
    return found


def available_memory_bytes(root: Path = ROOT) -> int:
    """What a run can still take: the kernel's MemAvailable, and no more than the cgroup's limit leaves."""
    available = meminfo(root).get("MemAvailable")
    if available is None:
        available = psutil.virtual_memory().available
    limit = cgroup_limit(root)
    return available if limit is None else min(available, limit[1])


def cgroup_limit(root: Path = ROOT) -> tuple[int, int] | None:
    """(limit, what it leaves), in bytes, of the cgroup with the least left; None where no limit applies.

    Both versions of cgroups. A limit holds for all groups below it, and those above count as well. Pages of files
    count as left: the kernel takes them back before it kills, as it does for MemAvailable.
    """
    total = meminfo(root).get("MemTotal") or psutil.virtual_memory().total
    found = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mount, names = "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # In a container the group may be named as the host names it, while the mount shows its inside alone.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            one = _group_limit(root.joinpath(mount, *parts[:depth]), *names)
            if one is not None and one[0] < total:
                found.append(one)
    return min(found, key=lambda one: one[1], default=None)


def _group_limit(directory: Path, limit_file: str, usage_file: str, prefix: str) -> tuple[int, int] | None:
    limit, usage = read_text(directory / limit_file), read_text(directory / usage_file)
    if not limit.isdigit() or not usage.isdigit():  # "max", or no such file
        return None
    counters = dict(line.split(" ", 1) for line in read_text(directory / "memory.stat").splitlines() if " " in line)
    of_files = sum(int(counters.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return int(limit), max(int(limit) - int(usage) + of_files, 0)


# --- the board ------------------------------------------------------------------------------------------------------


def tegra(root: Path = ROOT) -> str:
    """The name of a Jetson or another board with NVIDIA's Tegra, and its L4T release; "" on any other machine."""
    model = read_text(root / "proc/device-tree/model")
    release = read_text(root / "etc/nv_tegra_release").partition("\n")[0]
    # "# R36 (release), REVISION: 4.3, GCID: ..., BOARD: ...": the release is 36.4.3.
    words = release.replace(",", " ").split()
    if len(words) > 4 and words[1].startswith("R") and "REVISION:" in words:
        release = f"L4T {words[1][1:]}.{words[words.index('REVISION:') + 1]}"
    if not release and not ("NVIDIA" in model and ("Jetson" in model or "Tegra" in model)):
        return ""
    return ", ".join(part for part in (model or "Tegra", release) if part)


def is_unified(device: torch.device, root: Path = ROOT) -> bool:
    """Whether the device's memory is the host's: an integrated GPU, as on a Jetson. False for the CPU itself."""
    if device.type != "cuda":
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    integrated = getattr(properties, "is_integrated", None)
    return bool(tegra(root)) if integrated is None else bool(integrated)


def has_nvidia_device(root: Path = ROOT) -> bool:
    """Whether an NVIDIA GPU's driver or board is here, whatever torch says."""
    signs = ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/nvhost-ctrl-gpu", "dev/nvgpu")
    return bool(tegra(root)) or any((root / sign).exists() for sign in signs)


# --- swap and storage -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swap:
    """One area of swap, in bytes. ``compressed``: it lies in memory itself (zram)."""

    name: str
    size: int
    used: int

    @property
    def compressed(self) -> bool:
        return "zram" in self.name


def swaps(root: Path = ROOT) -> list[Swap]:
    """The areas in ``/proc/swaps``."""
    rows = [line.split() for line in read_text(root / "proc/swaps").splitlines()[1:]]
    return [Swap(row[0], int(row[2]) * 1024, int(row[3]) * 1024) for row in rows if len(row) >= 4]


@dataclass(frozen=True)
class Mount:
    """The file system that holds a path: where it is mounted, its type, and its device ("" if unknown)."""

    point: str
    kind: str
    device: str

    @property
    def in_memory(self) -> bool:
        return self.kind in ("tmpfs", "ramfs")

    @property
    def is_card(self) -> bool:
        """An SD card or eMMC."""
        return self.device.startswith("/dev/mmcblk")


def mount_of(path: Path, root: Path = ROOT) -> Mount:
    """By ``/proc/self/mounts``; its kind is "" where there is no such file."""
    target, found = path.resolve(), Mount("", "", "")
    for line in read_text(root / "proc/self/mounts").splitlines():
        device, point, kind = [word.replace("\\040", " ") for word in line.split(" ")[:3]]
        if target.is_relative_to(point) and len(point) >= len(found.point):  # a later mount covers an earlier one
            found = Mount(point, kind, device)
    return found


@dataclass(frozen=True)
class Speed:
    """Of storage, in bytes per second; ``write`` is None where nothing was written.

    Attributes:
        from_cache: whether the read came from the page cache: True, False, or None where the system does not tell.
    """

    read: float
    write: float | None
    from_cache: bool | None

    def __str__(self) -> str:
        cached = {True: " (from the page cache)", False: "", None: " (may be from the page cache)"}[self.from_cache]
        written = "" if self.write is None else f"write {self.write / MB:.0f} MB/s, "
        return f"{written}read {self.read / MB:.0f} MB/s{cached}"


MB = 1_000_000
PIECES = (4 << 20, 12 << 20, 48 << 20)
SECONDS = 1.0


def scratch_speed(directory: Path) -> Speed:
    """Writes up to 64 MiB in growing pieces, each synced, and reads the last one back after dropping its pages.

    Slow storage stops early: no piece is begun that would take longer than a second. OSError where nothing can be
    written.
    """
    with tempfile.TemporaryDirectory(prefix=files.TEMPORARY_PREFIX, dir=directory) as place:
        path, rate = Path(place) / "speed", 0.0
        for size in PIECES:
            if rate and size / rate > SECONDS:
                break
            data = os.urandom(size)  # what a compressing file system cannot shrink
            start = time.perf_counter()
            files.write_bytes(path, data)
            rate = size / max(time.perf_counter() - start, 1e-9)
        read = read_speed(path)
    return Speed(read.read, rate, read.from_cache)


def read_speed(path: Path, limit: int = 64 << 20) -> Speed:
    """Reads up to ``limit`` bytes of a file for up to a second, its pages dropped before. OSError if it cannot."""
    buffer, done = bytearray(1 << 20), 0
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before, start = _fetched(), time.perf_counter()
        while done < limit and time.perf_counter() - start < SECONDS and (count := file.readinto(buffer)):
            done += count
        seconds, after = time.perf_counter() - start, _fetched()
    from_cache = None if before is None or after is None else after - before < done // 2
    return Speed(done / max(seconds, 1e-9), None, from_cache)


def _fetched(root: Path = ROOT) -> int | None:
    """Bytes that this process had fetched from storage so far."""
    for line in read_text(root / "proc/self/io").splitlines():
        if line.startswith("read_bytes: "):
            return int(line.removeprefix("read_bytes: "))
    return None
