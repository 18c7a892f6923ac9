"""Sizes in bytes, and how users write them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {f"{prefix}ib": 1 << shift for prefix, shift in (("k", 10), ("m", 20), ("g", 30), ("t", 40))}


def parse_size(name: str, text: str) -> int:
    """Bytes: "900MiB", "1.5 GiB", "4GB", or a plain number of bytes. ValueError names ``name``."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    if found is None or found[2].lower() not in UNITS:
        raise ValueError(f"{name} must be a size such as 900MiB, 1.5GiB or 4GB, got {text!r}")
    size = float(found[1]) * UNITS[found[2].lower()]
    if not 1 <= size < 1 << 60:
        raise ValueError(f"{name} must be between 1 byte and 2**60 bytes, got {text!r}")
    return int(size)


GIB = 1 << 30


MB = 1_000_000


def mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


MIB = 1 << 20
