"""Names of temporary files: by them, a later process recognises what a crash left behind."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import zlib
from pathlib import Path

import psutil

TEMPORARY_PREFIX = ".mebp-tmp-"


def _origin() -> str:
    """Names the machine, and its boot and container: 8 hexadecimal digits each.

    A process's number says nothing on another machine, after a reboot, or in another container: so they are told apart.
    """
    boot = []
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            boot.append(os.readlink(source) if source.endswith("/pid") else Path(source).read_text())
    return "".join(f"{zlib.crc32(text.encode()):08x}" for text in (platform.node(), " ".join(boot)))


def temporary_prefix() -> str:
    """Of the names of temporaries: a later process can tell what a crash left behind."""
    return f"{TEMPORARY_PREFIX}{_origin()}-{os.getpid()}.{_started(os.getpid())}-"


def remove_leftovers(directory: Path) -> None:
    """Removes temporaries in ``directory`` whose process is no more; only those of this machine and container."""
    mine = _origin()
    for entry in directory.glob(f"{TEMPORARY_PREFIX}*"):
        origin, _, rest = entry.name[len(TEMPORARY_PREFIX) :].partition("-")
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if origin == mine:
                process, _, started = rest.partition("-")[0].partition(".")
                known = process.isdecimal()
                left = known and not (psutil.pid_exists(int(process)) and _started(int(process)) in ("", started))
            else:  # of an earlier boot, if it is this machine's and older than its start
                left = origin[:8] == mine[:8] and entry.lstat().st_mtime < psutil.boot_time()
            if left and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif left:
                entry.unlink()


def _started(process: int) -> str:
    """When a process began, in ticks since the boot: numbers are used again, and clocks are set. Empty if not known."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
