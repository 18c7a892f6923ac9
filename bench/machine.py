"""The machine and the sources that a result file was measured on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    """The processor's name as Linux knows it; elsewhere what Python finds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


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
