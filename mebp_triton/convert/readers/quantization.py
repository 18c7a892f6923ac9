"""Finds the quantisation that a model directory states, in each of the places where tools write it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mebp_triton.models.config import read_json_object

# Keys of config.json, and older files beside it with the method that wrote them.
KEYS = ("quantization_config", "compression_config", "quantization")
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
MLX = "mlx"


class Quantization(NamedTuple):
    """The quantisation that a model directory states.

    Attributes:
        method: the name of the format; None where none is stated.
        settings: what the tool wrote, by its own keys.
        where: the key of config.json, or the name of the file.
    """

    method: str | None
    settings: dict[str, Any]
    where: str


def quantization_in(config: Mapping[str, Any]) -> Quantization | None:
    """Finds the quantisation that the content of a ``config.json`` states; None for float weights."""
    for key in KEYS:
        settings = config.get(key)
        if not settings:
            continue
        if not isinstance(settings, dict):
            return Quantization(None, {}, key)
        method = settings.get("quant_method")
        if method is None and {"bits", "group_size"} <= settings.keys():
            method = MLX  # which names no method
        if key == "quantization" and method != MLX:
            continue  # a setting of another kind
        return Quantization(method if isinstance(method, str) else None, settings, key)
    return None


def find_quantization(path: Path, config: Mapping[str, Any]) -> Quantization | None:
    """Finds the quantisation of the directory ``path``, whose ``config.json`` holds ``config``.

    Raises:
        ValueError: a file that states it is damaged.
    """
    found = quantization_in(config)
    if found is not None:
        return found
    for name, method in FILES.items():
        if (path / name).exists():
            settings = read_json_object(path / name, "download it again")
            stated = settings.get("quant_method", method)
            return Quantization(stated if isinstance(stated, str) else None, settings, name)
    return None


def quantization_of(path: Path) -> Quantization | None:
    """The quantisation of the weights in ``path``; None if that cannot be read or is not stated."""
    with contextlib.suppress(ValueError, OSError):
        return find_quantization(path, read_json_object(path / "config.json", ""))
    return None
