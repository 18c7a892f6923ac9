"""Advice: what to set or install, given what the doctor found."""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path
from typing import Any

from mebp_triton.system.units import GIB, MB, MIB

LITTLE_MEMORY = 2 * GIB
# On slower storage, block inputs in files are likely to make a step wait.
SLOW_STORAGE = 100 * MB
JETSON_PTXAS = "/usr/local/cuda/bin/ptxas"
# JetPack 6 (L4T 36) has a CUDA of its own. From JetPack 7.2 (L4T 39) on, a Jetson runs what an Arm server runs.
JETPACK_6_TORCH = "pip install --index-url https://pypi.jetson-ai-lab.io/jp6/cu126 torch"
ARM_SERVER_TORCH = "pip install torch"
FIRST_ARM_SERVER_RELEASE = 39


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _has_python_headers() -> bool:
    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


def advise(findings: dict[str, Any], environ: dict[str, str]) -> list[str]:
    """Lines that say what to set or install. ``findings`` are those of ``examine``, ``environ`` the environment."""
    advice = [*_device_advice(findings, environ), *_memory_advice(findings), *_storage_advice(findings)]
    for package, use in (("gguf", "read GGUF files"), ("matplotlib", "draw the run's plots")):
        if importlib.util.find_spec(package) is None:
            advice.append(f"{package} is not installed: needed to {use}")
    if "FAILED" in findings["self_test"]:
        advice.append("the self-test failed: results on this machine would be wrong; use --backend panel and report it")
    return advice


def _on_jetson(findings: dict[str, Any]) -> bool:
    return bool(findings["board"] != "no Jetson")


def _torch_source(findings: dict[str, Any]) -> str:
    """Where a torch with CUDA for this machine comes from."""
    if not _on_jetson(findings):
        return "see pytorch.org"
    release = re.search(r"L4T (\d+)", findings["board"])
    if release is None:
        return f"JetPack 6: {JETPACK_6_TORCH}; JetPack 7: {ARM_SERVER_TORCH}"
    return ARM_SERVER_TORCH if int(release[1]) >= FIRST_ARM_SERVER_RELEASE else JETPACK_6_TORCH


def _device_advice(findings: dict[str, Any], environ: dict[str, str]) -> list[str]:
    advice = []
    has_gpu = bool(findings["compute_capability"])
    if not has_gpu and findings["cpu_code"].startswith("none: the package"):
        advice.append(
            "no compiled code for the CPU: products run in plain torch, two to three times slower; install a C compiler"
            " with OpenMP (sudo apt install gcc), then this package again, in its clone:"
            " CC=gcc pip install --force-reinstall --no-deps ."
        )
    if not has_gpu and not findings["nvidia_device"]:
        advice.append("no GPU found: a CUDA build of torch is needed to use one; training on the CPU works without one")
    elif not has_gpu and findings["torch_cuda"] == "none":
        advice.append(
            "an NVIDIA device is here, but this torch is built without CUDA: install one with it"
            f" ({_torch_source(findings)})"
        )
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
            f"TRITON_PTXAS_PATH={named} is not what Triton takes ({findings['ptxas']}): correct it or unset it"
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
        advice.append(
            "expandable_segments:True is set, with which allocations were seen to fail on Jetsons: if one fails with"
            " 'CUDA driver error: out of memory' while memory is free, unset PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF"
        )
    return advice


def _memory_advice(findings: dict[str, Any]) -> list[str]:
    advice = []
    available, limit = findings["available_memory_bytes"], findings["memory_limit_bytes"]
    if available < LITTLE_MEMORY:
        advice.append(
            f"only {available / MIB:.0f} MiB of memory are available: --memory-budget {available * 3 // 4 // MIB}MiB"
            " lets the plan keep weights and block inputs in files"
        )
    if limit is not None:
        advice.append(
            f"a cgroup (a container's limit) allows only {gib(limit)} of this machine's memory:"
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
        # With unified memory "host" is the same memory as "device", and costs copies.
        instead = "device" if findings["unified_memory"] or not findings["compute_capability"] else "host"
        advice.append(
            f"the scratch directory {what}: --checkpoints {instead} --optimizer-state {instead} where memory allows,"
            " or an --output-dir on NVMe"
        )
    store, available = findings.get("store_bytes"), findings["available_memory_bytes"]
    if store is not None and store > available:
        advice.append(
            f"the store ({gib(store)}) does not fit into the memory available ({gib(available)}): with --weights file"
            f" every step reads it again from storage ({findings['store_speed']})"
        )
    return advice
