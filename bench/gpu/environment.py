"""Part ``environment``: the device, its driver, versions, clocks, and the ceilings measured on it."""

from __future__ import annotations

import shutil
import subprocess

import torch

from mebp_triton.autotune.ceilings import measure_copy_gb_s, measure_matmul_tflop_s
from mebp_triton.system.machine import environment as versions

from .operands import dtype_name
from .session import Session

QUERY = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,"
    "power.limit,utilization.gpu,memory.used"
)

PROPERTIES = (
    "total_memory",
    "multi_processor_count",
    "L2_cache_size",
    "shared_memory_per_block_optin",
    "is_integrated",
)


def environment(session: Session) -> None:
    results, device = session.results, session.device
    results |= versions(device)
    results["clocks_before"] = query()
    if session.on_gpu:
        found = torch.cuda.get_device_properties(device)
        results["capability"] = list(torch.cuda.get_device_capability(device))
        results["cuda"] = torch.version.cuda
        results["properties"] = {name: getattr(found, name, None) for name in PROPERTIES}
    session.save(now=True)
    timer, limits = session.timer(), session.limits()
    # Each is measured twice: a difference between sides that is smaller than the one between the two is noise.
    results["copy_gb_s"] = [measure_copy_gb_s(device, timer, limits) for _ in range(2)]
    results["matmul_tflop_s"] = {
        dtype_name(dtype): [measure_matmul_tflop_s(device, timer, limits, dtype) for _ in range(2)]
        for dtype in session.sizes.dtypes
    }
    results["clocks_after"] = query()


def query() -> dict[str, str] | None:
    """Values of ``QUERY`` for the first device, from nvidia-smi; None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        return {"error": (done.stderr or done.stdout).strip()[:300]}
    return dict(zip(QUERY.split(","), (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=True))
