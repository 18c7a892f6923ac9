"""Units of memory, and sizes as users write them."""

from __future__ import annotations

import re

MB = 1_000_000
MIB = 1 << 20
GIB = 1 << 30
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": MB, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": MIB, "gib": GIB, "tib": 1 << 40}


def parse_size(name: str, text: str) -> int:
    """Bytes in "900MiB", "1.5 GiB", "4GB", or a plain number of bytes. ValueError names ``name``."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{name} must be a size such as 900MiB, 1.5GiB or 4GB, got {text!r}")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= size < 1 << 60:
        raise ValueError(f"{name} must be between 1 byte and 2**60 bytes, got {text!r}")
    return int(size)


def mib(size: int) -> str:
    """Bytes as whole MiB, with the unit."""
    return f"{size / MIB:.0f} MiB"
