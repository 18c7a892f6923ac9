"""Names of temporary files, from which a later process recognises what a crash left behind."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import zlib
from pathlib import Path

import psutil

TEMPORARY_PREFIX = ".mebp-tmp-"


def temporary_prefix(root: Path = Path("/")) -> str:
    """Prefix of temporary names: encodes machine, boot, container and process, so that leftovers are recognised.

    Args:
        root: where the kernel's files (``proc/``) are read.
    """
    return f"{TEMPORARY_PREFIX}{_origin(root)}-{os.getpid()}.{_start_of(os.getpid(), root)}-"


def remove_leftovers(directory: Path, root: Path = Path("/")) -> None:
    """Removes the temporaries in ``directory`` whose process has ended; only those of this machine and container."""
    mine = _origin(root)
    for entry in directory.glob(f"{TEMPORARY_PREFIX}*"):
        origin, _, rest = entry.name[len(TEMPORARY_PREFIX) :].partition("-")
        with contextlib.suppress(OSError):  # another process removed it, or it is another user's
            if origin == mine:
                process, _, start = rest.partition("-")[0].partition(".")
                is_left = process.isdecimal() and not _is_running(int(process), start, root)
            else:  # it is left if this machine wrote it before its last start
                is_left = origin[:8] == mine[:8] and entry.lstat().st_mtime < psutil.boot_time()
            if is_left and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif is_left:
                entry.unlink()


def _origin(root: Path) -> str:
    """Identifies the machine, and its boot and container: 8 hexadecimal digits each.

    A process's number means something else on another machine, after a reboot, and in another container.
    """
    boot = []
    for source in ("proc/sys/kernel/random/boot_id", "proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            path = root / source
            boot.append(os.readlink(path) if path.is_symlink() else path.read_text())
    return "".join(f"{zlib.crc32(text.encode()):08x}" for text in (platform.node(), " ".join(boot)))


def _is_running(process: int, start: str, root: Path) -> bool:
    """Whether the process with this number and start still runs. Where no start can be read, its number decides."""
    return psutil.pid_exists(process) and _start_of(process, root) in ("", start)


def _start_of(process: int, root: Path) -> str:
    """The time a process began, in ticks since the boot; "" if unknown.

    It tells processes apart whose numbers are equal. Ticks, because clocks are set.
    """
    with contextlib.suppress(OSError, IndexError):
        return (root / f"proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
