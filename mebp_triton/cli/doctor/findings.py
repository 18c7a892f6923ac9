"""What the doctor finds on this machine: memory, storage, device, compilers, and a self-test of the int4 products."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from mebp_triton.kernels import functions, native
from mebp_triton.kernels.accuracy import PRODUCT_LIMITS, random_weight
from mebp_triton.kernels.configs import Panel
from mebp_triton.kernels.reference import decode
from mebp_triton.kernels.routing import has_triton, resolve_backend
from mebp_triton.kernels.tables import SHIPPED, architecture_of, read_table, user_table_path
from mebp_triton.store.reader import Store
from mebp_triton.system import machine, storage
from mebp_triton.system.machine import environment
from mebp_triton.system.storage import Speed
from mebp_triton.system.units import MIB

from .advice import advise, gib


def examine(
    store: Path | None = None, scratch: Path | None = None, root: Path = machine.ROOT, measure: bool = True
) -> dict[str, Any]:
    """Facts about this machine by name. Under "advice" is a list of lines that say what to set or install.

    Args:
        store: a store to time as well, and to compare with the memory available.
        scratch: the directory where a run would keep its files; the system's temporary directory by default.
        root: the directory below which files of the operating system (``proc``, ``sys``) are read.
        measure: whether to time the storage.

    Raises:
        ValueError: ``store`` is no store, or ``scratch`` no directory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scratch = Path(tempfile.gettempdir()) if scratch is None else scratch
    if not scratch.is_dir():
        raise ValueError(f"scratch directory {scratch} is not a directory: name one that exists")
    here = environment(device)
    findings: dict[str, Any] = {"triton": "not installed"} | dict(here["versions"])
    findings |= {
        "platform": here["platform"],
        "board": machine.tegra(root) or "no Jetson",
        "cpu_threads": torch.get_num_threads(),
        "cpu_code": native.described(),
        **_memory(root),
        **_storage(scratch, store, root, measure),
        **_device(device, root),
        "backend": resolve_backend("auto", device),
        "self_test": _self_test(device),
    }
    findings["advice"] = advise(findings, dict(os.environ))
    return findings


def _memory(root: Path) -> dict[str, Any]:
    memory, limit = machine.meminfo(root), machine.cgroup_limit(root)
    total = memory.get("MemTotal") or psutil.virtual_memory().total
    available = machine.available_memory_bytes(root)
    areas = storage.swaps(root)
    swap = sum(area.size for area in areas) if root != machine.ROOT or areas else psutil.swap_memory().total
    compressed = sum(area.size for area in areas if area.compressed)
    facts = {
        "memory": f"{gib(total)}, {gib(available)} available",
        "available_memory_bytes": available,
        "memory_limit": "none" if limit is None else f"{gib(limit[0])} by a cgroup, {gib(limit[1])} left",
        "memory_limit_bytes": None if limit is None else limit[0],
        "swap": gib(swap) + (f", of which {gib(compressed)} on zram" if compressed else ""),
        "swap_bytes": swap,
        "swap_zram_bytes": compressed,
        "page_cache": "unknown",
    }
    if "Cached" in memory:
        ratios = [machine.read_text(root / f"proc/sys/vm/{name}") for name in ("dirty_background_ratio", "dirty_ratio")]
        limits = f"; writing back starts at {ratios[0]} %, writers wait at {ratios[1]} %" if all(ratios) else ""
        dirty = memory.get("Dirty", 0) / MIB
        facts["page_cache"] = f"{gib(memory['Cached'])} cached, {dirty:.1f} MiB dirty{limits}"
    return facts


def _storage(scratch: Path, store: Path | None, root: Path, measure: bool) -> dict[str, Any]:
    mount = storage.mount_of(scratch, root)
    facts: dict[str, Any] = {
        "scratch_directory": f"{scratch}, {gib(psutil.disk_usage(str(scratch)).free)} free",
        "scratch_file_system": f"{mount.kind or 'unknown'} on {mount.device or 'unknown'}",
        "scratch_in_memory": mount.in_memory,
        "scratch_on_card": mount.is_card,
        **_speed("scratch", lambda: storage.scratch_speed(scratch), measure),
    }
    if store is not None:
        opened = Store(store)
        largest = max((file.mapped for file in opened.files.values()), key=lambda mapped: mapped.size)
        largest.drop()
        facts |= {
            "store": f"{store}, {gib(opened.nbytes())}",
            "store_bytes": opened.nbytes(),
            **_speed("store", lambda: storage.read_speed(largest.path), measure),
        }
    return facts


def _speed(name: str, time_storage: Callable[[], Speed], measure: bool) -> dict[str, Any]:
    """The facts ``NAME_speed``, in words, and ``NAME_bytes_per_second``, of the slower direction."""
    if not measure:
        return {f"{name}_speed": "not measured", f"{name}_bytes_per_second": None}
    try:
        speed = time_storage()
    except OSError as error:
        return {f"{name}_speed": f"not measured: {error.strerror}", f"{name}_bytes_per_second": None}
    slowest = speed.read if speed.write is None else min(speed.read, speed.write)
    return {f"{name}_speed": str(speed), f"{name}_bytes_per_second": int(slowest)}


def _device(device: torch.device, root: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": "none: training runs on the CPU",
        "nvidia_device": device.type == "cuda" or machine.has_nvidia_device(root),
        "torch_cuda": torch.version.cuda or torch.version.hip or "none",
        "unified_memory": machine.is_unified(device, root),
        "compute_capability": architecture_of(device),
        "kernel_table": "none needed on the CPU",
        "ptxas": "none needed without Triton",
        "c_compiler": c_compiler() or "none found",
    }
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        architecture = facts["compute_capability"]
        facts["device"] = f"{properties.name}, {architecture}, {gib(properties.total_memory)}"
        facts["kernel_table"] = kernel_table(architecture)
    if has_triton() and torch.version.hip is None:
        facts["ptxas"] = find_ptxas(facts["compute_capability"])
    return facts


def kernel_table(architecture: str) -> str:
    """The kernel tables for this compute capability, how many of their entries were measured, and sizes of panels."""
    own = read_table(user_table_path(architecture), architecture)
    shipped = read_table(SHIPPED / f"{architecture}.json", architecture)
    parts = []
    for name, table in (("your own", own), ("shipped", shipped)):
        if table:
            measured = sum(entry.provenance == "measured" for entry in table.values())
            sizes = sorted({entry.route.mib for entry in table.values() if isinstance(entry.route, Panel)})
            panels = f", panels of {' and '.join(map(str, sizes))} MiB" if sizes else ""
            parts.append(f"{name}: {len(table)} entries, {measured} of them measured{panels}")
    return "; ".join(parts) or f"none for {architecture}: kernels take their default configuration"


def find_ptxas(architecture: str) -> str:
    """The assembler that Triton would start for this architecture, with its version; or "missing" and the reason."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        digits = architecture.removeprefix("sm_")
        tool = get_ptxas(int(digits) if digits.isdigit() else 80)
    except (ImportError, RuntimeError, OSError) as error:
        # Triton has no NVIDIA backend, or finds no ptxas that runs, or one that is not executable.
        return f"missing: {' '.join(str(error).split())}"
    return f"{tool.path}, release {tool.version}"


def c_compiler() -> str:
    """The C compiler that Triton would use for its launchers, found as Triton finds it; "" if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or ""


def _self_test(device: torch.device) -> str:
    """Whether ``X·Wᵀ`` and ``dY·W`` of a small random int4 matrix agree with float64 on the decoded codes."""
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(160, 200, torch.device("cpu"), generator=generator)
    x, dy = (torch.randn(7, size, generator=generator) for size in (200, 160))
    worst = 0.0
    try:
        weight, x, dy = weight.to(device), x.to(device), dy.to(device)
        truth = decode(weight)
        for ours, exact in (
            (functions.int4_matmul(x, weight), x.double() @ truth.t()),
            (functions.int4_matmul_dx(dy, weight), dy.double() @ truth),
        ):
            worst = max(worst, float((ours.double() - exact).norm() / exact.norm()))
    except Exception as error:  # a missing compiler or driver, say: the doctor is there to report it
        return f"int4 products FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    word = "passed" if worst <= PRODUCT_LIMITS[torch.float32] else "FAILED"
    return f"int4 products {word}: relative error {worst:.1e} against float64"
