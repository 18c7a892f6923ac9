"""Where an adapter lies. Imports no torch, so that ``--adapter`` is looked up before any library is there."""

from __future__ import annotations

from pathlib import Path

CONFIG = "adapter_config.json"


def find_adapter(given: Path | str) -> Path:
    """The adapter's own directory: ``given``, or ``adapter/`` in it if it is a run directory."""
    inside = Path(given) / "adapter"
    return inside if (inside / CONFIG).exists() and not (Path(given) / CONFIG).exists() else Path(given)
