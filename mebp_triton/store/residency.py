"""The three places where tensors may wait: the device, host memory, and a file."""

from __future__ import annotations

from typing import Literal, get_args

Residency = Literal["device", "host", "file"]
RESIDENCIES: tuple[Residency, ...] = get_args(Residency)


def check_residency(name: str, value: str) -> None:
    """Raises ValueError, which names ``name``, where ``value`` is none of the three."""
    if value not in RESIDENCIES:
        raise ValueError(f"{name} must be one of {', '.join(RESIDENCIES)}, got {value!r}")
