"""The doctor: what this machine has, a self-test of the int4 products, and what a user should set."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from . import machine
from .kernels.ops import has_triton, resolve_backend
from .kernels.tables import SHIPPED, architecture_of, read_table, user_table_path
from .machine import MB, Speed
from .report import MIB, environment
from .stores.format import Store

GIB = 1 << 30
LITTLE_MEMORY = 2 * GIB
# Below this, checkpoints in files are likely to hold a step up.
SLOW_STORAGE = 100 * MB
JETSON_PTXAS = "/usr/local/cuda/bin/ptxas"
JETSON_INDEX = "https://pypi.jetson-ai-lab.io/jp6/cu126"


def examine(
    store: Path | None = None, scratch: Path | None = None, root: Path = machine.ROOT, measure: bool = True
) -> dict[str, Any]:
    """Facts by name; ``advice`` is a list of lines.

    Args:
        store: measured too, and compared with the memory available.
        scratch: where files of a run would lie; the system's temporary directory by default.
        root: below which the kernel's files are read.
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
        **_memory(root),
        **_storage(scratch, store, root, measure),
        **_device(device, root),
        "backend": resolve_backend("auto", device),
        "self_test": _self_test(device),
    }
    findings["advice"] = advise(findings, dict(os.environ))
    return findings


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _memory(root: Path) -> dict[str, Any]:
    memory, limit = machine.meminfo(root), machine.cgroup_limit(root)
    total = memory.get("MemTotal") or psutil.virtual_memory().total
    available = machine.available_memory_bytes(root)
    areas = machine.swaps(root)
    swap = sum(area.size for area in areas) if root != machine.ROOT or areas else psutil.swap_memory().total
    compressed = sum(area.size for area in areas if area.compressed)
    found = {
        "memory": f"{_gib(total)}, {_gib(available)} available",
        "available_memory_bytes": available,
        "memory_limit": "none" if limit is None else f"{_gib(limit[0])} by a cgroup, {_gib(limit[1])} left",
        "memory_limit_bytes": None if limit is None else limit[0],
        "swap": _gib(swap) + (f", of which {_gib(compressed)} on zram" if compressed else ""),
        "swap_bytes": swap,
        "swap_zram_bytes": compressed,
        "page_cache": "unknown",
    }
    if "Cached" in memory:
        ratios = [machine.read_text(root / f"proc/sys/vm/{name}") for name in ("dirty_background_ratio", "dirty_ratio")]
        limits = f"; writing back starts at {ratios[0]} %, writers wait at {ratios[1]} %" if all(ratios) else ""
        dirty = memory.get("Dirty", 0) / MIB
        found["page_cache"] = f"{_gib(memory['Cached'])} cached, {dirty:.1f} MiB dirty{limits}"
    return found


def _storage(scratch: Path, store: Path | None, root: Path, measure: bool) -> dict[str, Any]:
    mount = machine.mount_of(scratch, root)
    found: dict[str, Any] = {
        "scratch_directory": f"{scratch}, {_gib(psutil.disk_usage(str(scratch)).free)} free",
        "scratch_file_system": f"{mount.kind or 'unknown'} on {mount.device or 'unknown'}",
        "scratch_in_memory": mount.in_memory,
        "scratch_on_card": mount.is_card,
        **_speed("scratch", lambda: machine.scratch_speed(scratch), measure),
    }
    if store is not None:
        opened = Store(store)
        largest = max((file.mapped for file in opened.files.values()), key=lambda mapped: mapped.size)
        largest.drop()
        found |= {
            "store": f"{store}, {_gib(opened.nbytes())}",
            "store_bytes": opened.nbytes(),
            **_speed("store", lambda: machine.read_speed(largest.path), measure),
        }
    return found


def _speed(name: str, take: Any, measure: bool) -> dict[str, Any]:
    if not measure:
        return {f"{name}_speed": "not measured", f"{name}_bytes_per_second": None}
    try:
        speed: Speed = take()
    except OSError as error:
        return {f"{name}_speed": f"not measured: {error.strerror}", f"{name}_bytes_per_second": None}
    slowest = speed.read if speed.write is None else min(speed.read, speed.write)
    return {f"{name}_speed": str(speed), f"{name}_bytes_per_second": int(slowest)}


def _device(device: torch.device, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
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
        architecture = found["compute_capability"]
        found["device"] = f"{properties.name}, {architecture}, {_gib(properties.total_memory)}"
        found["kernel_table"] = kernel_table(architecture)
    if has_triton() and torch.version.hip is None:
        found["ptxas"] = find_ptxas(found["compute_capability"])
    return found


def kernel_table(architecture: str) -> str:
    """Whether launches on this compute capability have a table, and what it rests on."""
    own = read_table(user_table_path(architecture), architecture)
    shipped = read_table(SHIPPED / f"{architecture}.json", architecture)
    parts = []
    for name, table in (("your own", own), ("shipped", shipped)):
        if table:
            measured = sum(entry.provenance == "measured" for entry in table.values())
            parts.append(f"{name}: {len(table)} entries, {measured} of them measured")
    return "; ".join(parts) or f"none for {architecture}: kernels take their default configuration"


def find_ptxas(architecture: str) -> str:
    """The assembler that Triton would start for this architecture, and its version; else "missing" and why."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        digits = architecture.removeprefix("sm_")
        tool = get_ptxas(int(digits) if digits.isdigit() else 80)
    except (ImportError, RuntimeError, OSError) as error:  # no NVIDIA backend, none that runs, none that is executable
        return f"missing: {' '.join(str(error).split())}"
    return f"{tool.path}, release {tool.version}"


def c_compiler() -> str:
    """What Triton compiles its launchers with, as it looks for it; "" if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or ""


def _has_python_headers() -> bool:
    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


def _self_test(device: torch.device) -> str:
    """Forward and dX of a small random int4 matrix against float64 on the decoded codes."""
    from .kernels.layout import Int4Weight
    from .kernels.ops import int4_matmul, int4_matmul_dx
    from .kernels.reference import decode

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (160, 200), generator=generator).to(torch.uint8)
    weight = Int4Weight.from_codes(codes, torch.rand(4, 160, generator=generator).half(), 64)
    x = torch.randn(7, 200, generator=generator)
    dy = torch.randn(7, 160, generator=generator)
    worst = 0.0
    try:
        weight, x, dy = weight.to(device), x.to(device), dy.to(device)
        truth = decode(weight)
        for ours, exact in (
            (int4_matmul(x, weight), x.double() @ truth.t()),
            (int4_matmul_dx(dy, weight), dy.double() @ truth),
        ):
            worst = max(worst, float((ours.double() - exact).norm() / exact.norm()))
    except Exception as error:  # a compiler or a driver that is not there: what a doctor is for
        return f"int4 products FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    word = "passed" if worst <= 1e-6 else "FAILED"
    return f"int4 products {word}: relative error {worst:.1e} against float64"


# --- advice ---------------------------------------------------------------------------------------------------------


def advise(findings: dict[str, Any], environ: dict[str, str]) -> list[str]:
    """What to set, given what was found: commands and flags."""
    advice = [*_device_advice(findings, environ), *_memory_advice(findings), *_storage_advice(findings)]
    for package, use in (("gguf", "read GGUF files"), ("matplotlib", "draw the run's plots")):
        if importlib.util.find_spec(package) is None:
            advice.append(f"{package} is not installed: needed to {use}")
    if "FAILED" in findings["self_test"]:
        advice.append("the self-test failed: results on this machine would be wrong; use --backend panel and report it")
    return advice


def _on_jetson(findings: dict[str, Any]) -> bool:
    return bool(findings["board"] != "no Jetson")


def _device_advice(findings: dict[str, Any], environ: dict[str, str]) -> list[str]:
    advice = []
    has_gpu = bool(findings["compute_capability"])
    if not has_gpu and not findings["nvidia_device"]:
        advice.append("no GPU found: a CUDA build of torch is needed to use one; the CPU path works without")
    elif not has_gpu and findings["torch_cuda"] == "none":
        where = f"pip install --index-url {JETSON_INDEX} torch" if _on_jetson(findings) else "see pytorch.org"
        advice.append(f"an NVIDIA device is here, but this torch is built without CUDA: install one with it ({where})")
    elif not has_gpu:
        advice.append(
            f"an NVIDIA device is here and torch is built for CUDA {findings['torch_cuda']}, but finds no GPU: the"
            " driver may be too old for it, or a container may lack --runtime nvidia (Docker: --gpus all)"
        )
    if has_gpu and findings["triton"] == "not installed":
        advice.append("Triton is not installed: pip install triton, or use --backend panel")
    named = environ.get("TRITON_PTXAS_PATH", "")
    if has_gpu and findings["ptxas"].startswith("missing"):
        path = JETSON_PTXAS if _on_jetson(findings) else "/path/to/ptxas"
        advice.append(f"Triton has no ptxas that runs: export TRITON_PTXAS_PATH={path}, or use --backend panel")
    elif named and findings["ptxas"].startswith("/") and not findings["ptxas"].startswith(f"{named},"):
        advice.append(
            f"TRITON_PTXAS_PATH={named} is not what Triton takes ({findings['ptxas']}): set it right or unset"
        )
    if has_gpu and findings["backend"] == "triton":
        if findings["c_compiler"] == "none found":
            advice.append("Triton needs a C compiler: sudo apt install gcc, or use --backend panel")
        if not _has_python_headers():
            advice.append("Triton may need Python's headers: sudo apt install python3-dev, or use --backend panel")
    if findings["kernel_table"].startswith("none for"):
        advice.append("no kernel table for this GPU: mebp tune --store STORE finds configurations for it")
    settings = environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:True" in settings and _on_jetson(findings):
        advice.append("expandable_segments:True fails on Tegra: unset PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF")
    return advice


def _memory_advice(findings: dict[str, Any]) -> list[str]:
    advice = []
    available, limit = findings["available_memory_bytes"], findings["memory_limit_bytes"]
    if available < LITTLE_MEMORY:
        advice.append(
            f"only {available / MIB:.0f} MiB of memory are available: --memory-budget {available * 3 // 4 // MIB}MiB"
            " lets the plan keep weights and checkpoints in files"
        )
    if limit is not None:
        advice.append(
            f"a cgroup (a container's limit) allows {_gib(limit)}, less than the machine has: that is what counts;"
            " raise it (docker run --memory), or stay below it with --memory-budget"
        )
    if findings["unified_memory"]:
        advice.append("GPU and CPU share one memory: --weights file and --checkpoints file save memory, host does not")
    if findings["swap_zram_bytes"] and _on_jetson(findings):
        advice.append(
            "swap is on zram, which takes its space from the same memory: a swap file on NVMe instead"
            " (sudo systemctl disable nvzramconfig; docs/jetson.md has the commands)"
        )
    elif not findings["swap_bytes"] and _on_jetson(findings):
        advice.append("there is no swap: a swap file on NVMe gives idle processes a place (docs/jetson.md)")
    return advice


def _storage_advice(findings: dict[str, Any]) -> list[str]:
    advice = []
    speed = findings["scratch_bytes_per_second"]
    if findings["scratch_in_memory"]:
        advice.append("the scratch directory is in memory: files there save none; choose an --output-dir on a disk")
    elif findings["scratch_on_card"] or (speed is not None and speed < SLOW_STORAGE):
        what = "is on an SD card or eMMC" if findings["scratch_on_card"] else f"is slow ({findings['scratch_speed']})"
        # On unified memory "host" is the same memory, with copies on the way.
        instead = "device" if findings["unified_memory"] or not findings["compute_capability"] else "host"
        advice.append(
            f"the scratch directory {what}: --checkpoints {instead} --optimizer-state {instead} where memory allows,"
            " or an --output-dir on NVMe"
        )
    store, available = findings.get("store_bytes"), findings["available_memory_bytes"]
    if store is not None and store > available:
        advice.append(
            f"the store ({_gib(store)}) does not fit into the memory available ({_gib(available)}): with --weights file"
            f" every step reads it again from storage ({findings['store_speed']})"
        )
    return advice
