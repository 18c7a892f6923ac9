"""Reads that either get all bytes or raise, and checksums of what was read."""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .errors import FileError

CHECKSUM_CHUNK = 1 << 20


def read_bytes(path: Path, limit: int = 1 << 28) -> bytes:
    """Reads a whole file. FileError where it is none, or longer than ``limit``."""
    check_regular(path)
    if path.stat().st_size > limit:
        raise FileError(f"{path} has {path.stat().st_size} bytes, more than the {limit} that such a file may have")
    return path.read_bytes()


def check_regular(path: Path) -> None:
    """Raises FileError where ``path`` is no regular file. Opening a FIFO would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"{path} does not exist") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} is not a regular file")


def checksums(data: memoryview | bytes, chunk: int = CHECKSUM_CHUNK) -> list[int]:
    """CRC-32 of each ``chunk`` bytes."""
    view = memoryview(data)
    return [zlib.crc32(view[start : start + chunk]) for start in range(0, len(view), chunk)]


def file_checksums(path: Path) -> list[int]:
    """``checksums`` of a file's bytes, read chunk by chunk."""
    check_regular(path)
    with open(path, "rb") as file:
        return [zlib.crc32(data) for data in iter(lambda: file.read(CHECKSUM_CHUNK), b"")]


def joint_checksum(paths: Iterable[Path]) -> int:
    """One CRC-32 over the ``file_checksums`` of several files, by which a model is known whatever its files' names."""
    return zlib.crc32(json.dumps([file_checksums(path) for path in paths]).encode())


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_fully(handle: int, view: memoryview, offset: int, what: Path | str) -> None:
    """Fills ``view`` from ``offset`` of an open file. FileError, which names ``what``, where the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if count == 0:
            raise FileError(f"{what} ended {len(view) - done} bytes early")
        done += count
