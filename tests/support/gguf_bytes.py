"""GGUF headers byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Iterable

F32, Q4_0 = 0, 2  # ggml's numbers


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: Iterable[int], kind: int = F32, offset: int = 0) -> bytes:
    """A row of the tensor table; ``shape`` in torch's order."""
    sides = list(shape)[::-1]
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


def content(
    pairs: Iterable[bytes] = (), tensors: Iterable[bytes] = (), data: int = 0, version: int = 3, alignment: int = 32
) -> bytes:
    pairs, tensors = list(pairs), list(tensors)
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return header + bytes(-len(header) % alignment + data)
