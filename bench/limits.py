"""Runs a command under a hard limit of memory, by a control group, and watches what it takes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")


@dataclass
class Watched:
    """How a command ended, and the highest values of its resident set in bytes.

    Attributes:
        peak: the kernel's own figure. anonymous, file_backed: the highest samples.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    peak: int
    anonymous: int
    file_backed: int


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """Yields a control group that gets ``limit`` bytes of memory and no swap; OSError where none can be made."""
    second = (CGROUPS / "cgroup.controllers").exists()
    parent = CGROUPS if second else CGROUPS / "memory"
    group = parent / f"mebp-limit-{os.getpid()}"
    group.mkdir()
    try:
        if second:
            (group / "memory.max").write_text(str(limit))
            (group / "memory.swap.max").write_text("0")
        else:
            (group / "memory.limit_in_bytes").write_text(str(limit))
            (group / "memory.swappiness").write_text("0")
        yield group
    finally:
        group.rmdir()


def watched(command: Sequence[str], limit: int | None = None, environment: dict[str, str] | None = None) -> Watched:
    """Runs ``command``; with ``limit``, in a ``memory_group``, or by systemd-run where none can be made."""
    with contextlib.ExitStack() as stack:
        group = None
        if limit is not None:
            try:
                group = stack.enter_context(memory_group(limit))
            except OSError:
                if shutil.which("systemd-run") is None:
                    raise
                limits = ["-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
                command = ["systemd-run", "--user", "--scope", "-q", *limits, *command]
        return _run(command, group, environment)


def _run(command: Sequence[str], group: Path | None, environment: dict[str, str] | None) -> Watched:
    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    started = time.perf_counter()
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=enter,
        env=None if environment is None else os.environ | environment,
    )
    most = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0, "RssShmem": 0}
    finished: Any = None
    while finished is None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
            for name in most:
                most[name] = max(most[name], int(lines[name].split()[0]) * 1024)
        try:
            finished = child.communicate(timeout=0.02)
        except subprocess.TimeoutExpired:
            continue
    seconds = time.perf_counter() - started
    file_backed = most["RssFile"] + most["RssShmem"]
    return Watched(child.returncode, *finished, seconds, most["VmHWM"], most["RssAnon"], file_backed)
