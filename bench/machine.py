"""The machine and the sources that a result file was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def _cpuinfo(*names: str) -> str:
    """What Linux has of the first core under one of these names; "" if it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0].strip() in names), "")


def processor() -> str:
    """The processor's name as Linux knows it; elsewhere what Python finds."""
    return _cpuinfo("model name") or platform.processor()


def processor_facts() -> dict[str, Any]:
    """Name, cores and features of the processor, and the instructions of our compiled code; null without any."""
    from mebp_triton.kernels.native import instructions

    flags = _cpuinfo("flags", "Features").split()
    return {"processor": processor(), "cpu_count": os.cpu_count(), "flags": flags, "native": instructions()}


def git(*words: str) -> str | None:
    """Runs a git command in this repository; returns its output, or None if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    return git("rev-parse", "HEAD")


def unwritable(path: Path) -> OSError | None:
    """Why a result cannot be written to ``path``, found out before anything is measured; its directory is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.exists()
        with open(path, "a"):
            pass
        if not known:
            path.unlink()
    except OSError as error:
        return error
    return None
