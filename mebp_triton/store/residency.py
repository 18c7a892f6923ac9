"""The three places where tensors may wait: device, host, file."""

from __future__ import annotations

from typing import Literal

Residency = Literal["device", "host", "file"]
RESIDENCIES: tuple[Residency, ...] = ("device", "host", "file")


def check_residency(name: str, value: str) -> None:
    if value not in RESIDENCIES:
        raise ValueError(f"{name} must be one of {', '.join(RESIDENCIES)}, got {value!r}")
