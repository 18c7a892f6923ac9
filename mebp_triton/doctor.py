"""What this machine has: versions, memory, devices, and what a user should set."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from .kernels.ops import resolve_backend
from .report import MIB, environment

GIB = 1 << 30


def examine() -> dict[str, Any]:
    """Facts by name; ``advice`` is a list of lines."""
    memory = psutil.virtual_memory()
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if has_cuda else "cpu")
    findings: dict[str, Any] = {name: version for name, version in environment(device)["versions"].items()}
    findings |= {
        "platform": environment(device)["platform"],
        "cpu_threads": torch.get_num_threads(),
        "memory": f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available",
        "swap": f"{psutil.swap_memory().total / GIB:.1f} GiB",
        "scratch_directory": _scratch(),
        "device": "none: training runs on the CPU",
        "backend": resolve_backend("auto", device),
        "self_test": _self_test(device),
    }
    if has_cuda:
        properties: Any = torch.cuda.get_device_properties(device)
        findings["device"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / GIB:.1f} GiB"
        )
        findings["unified_memory"] = bool(getattr(properties, "is_integrated", False))
    findings["advice"] = _advice(findings, memory.available, has_cuda)
    return findings


def _scratch() -> str:
    directory = Path(tempfile.gettempdir())
    return f"{directory}, {psutil.disk_usage(str(directory)).free / GIB:.1f} GiB free"


def _self_test(device: torch.device) -> str:
    """Forward and dX of a small random int4 matrix against float64 on the decoded codes."""
    from .kernels.layout import Int4Weight
    from .kernels.ops import int4_matmul, int4_matmul_dx
    from .kernels.reference import decode

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (160, 200), generator=generator).to(torch.uint8)
    weight = Int4Weight.from_codes(codes, torch.rand(4, 160, generator=generator).half(), 64).to(device)
    x = torch.randn(7, 200, generator=generator).to(device)
    dy = torch.randn(7, 160, generator=generator).to(device)
    truth = decode(weight)
    worst = 0.0
    for ours, exact in (
        (int4_matmul(x, weight), x.double() @ truth.t()),
        (int4_matmul_dx(dy, weight), dy.double() @ truth),
    ):
        worst = max(worst, float((ours.double() - exact).norm() / exact.norm()))
    word = "passed" if worst <= 1e-6 else "FAILED"
    return f"int4 products {word}: relative error {worst:.1e} against float64"


def _advice(findings: dict[str, Any], available: int, has_cuda: bool) -> list[str]:
    advice = []
    if not has_cuda:
        advice.append("no GPU found: a CUDA build of torch is needed to use one; the CPU path works without")
    if available < 2 * GIB:
        advice.append(f"only {available / MIB:.0f} MiB of memory are available: keep weights and checkpoints in files")
    if "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") and findings.get("unified_memory"):
        advice.append("PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, which fails on Tegra: unset it")
    for package, use in (("gguf", "read GGUF files"), ("matplotlib", "draw the run's plots")):
        if importlib.util.find_spec(package) is None:
            advice.append(f"{package} is not installed: needed to {use}")
    if "FAILED" in findings["self_test"]:
        advice.append("the self-test failed: results on this machine would be wrong; use --backend panel and report it")
    return advice
