"""What this machine has: memory that a run may take, its board and its devices.

Everything is read from the kernel's files below ``root``, so that a test's root shows another machine. What a system
does not tell counts as absent: macOS has no ``/proc``, and a container may hide ``/sys``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from mebp_triton import __version__

ROOT = Path("/")


def read_text(path: Path) -> str:
    """Reads a small file of the kernel; "" where there is none or it may not be read."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace").rstrip("\0\n")
    except OSError:
        return ""


# --- memory ---------------------------------------------------------------------------------------------------------


def meminfo(root: Path = ROOT) -> dict[str, int]:
    """``/proc/meminfo`` in bytes, by its names; empty where there is none."""
    sizes = {}
    for line in read_text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if unit == "kB" and number.isdigit():
            sizes[name] = int(number) * 1024
    return sizes


def available_memory_bytes(root: Path = ROOT) -> int:
    """Bytes that a run can still take: the kernel's MemAvailable, and no more than the cgroup's limit leaves."""
    available = meminfo(root).get("MemAvailable")
    if available is None:
        available = psutil.virtual_memory().available
    limit = cgroup_limit(root)
    return available if limit is None else min(available, limit[1])


def cgroup_limit(root: Path = ROOT) -> tuple[int, int] | None:
    """The limit of the cgroup that leaves least, and the bytes it leaves; None where no limit applies.

    Reads both versions of cgroups. A group's limit holds for all groups below it, so those above this process's count
    as well. Pages of files count as left: the kernel takes them back before it kills, as it does for MemAvailable.
    """
    total = meminfo(root).get("MemTotal") or psutil.virtual_memory().total
    limits = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mount, names = "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # In a container the group may have the host's name for it, while the mount shows only the container's groups.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            limit = _group_limit(root.joinpath(mount, *parts[:depth]), *names)
            if limit is not None and limit[0] < total:
                limits.append(limit)
    return min(limits, key=lambda limit: limit[1], default=None)


def _group_limit(directory: Path, limit_file: str, usage_file: str, prefix: str) -> tuple[int, int] | None:
    """The limit of one group and the bytes it leaves; ``prefix`` stands before the counters that include its groups."""
    limit, usage = read_text(directory / limit_file), read_text(directory / usage_file)
    if not limit.isdigit() or not usage.isdigit():  # "max", or no such file
        return None
    counters = dict(line.split(" ", 1) for line in read_text(directory / "memory.stat").splitlines() if " " in line)
    file_pages = sum(int(counters.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return int(limit), max(int(limit) - int(usage) + file_pages, 0)


# --- the board ------------------------------------------------------------------------------------------------------


def tegra(root: Path = ROOT) -> str:
    """The name and the L4T release of a Jetson, or another board with NVIDIA's Tegra; "" on any other machine."""
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


def resolve_device(name: str | None) -> str:
    """``name``, or a GPU if there is one and otherwise the CPU. ValueError for a device that is not here."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (":" in name and not index.isdecimal())):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not here: torch sees {torch.cuda.device_count()} GPUs")
    return name


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """The versions of Python and the packages, the device, the platform and the number of threads."""
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes", "safetensors")
    versions = {"mebp-triton": __version__, "python": platform.python_version()}
    for package in packages:
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    name = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else platform.machine()
    system = f"{platform.system()} {platform.machine()}"
    return {"versions": versions, "device": name, "platform": system, "threads": torch.get_num_threads()}
