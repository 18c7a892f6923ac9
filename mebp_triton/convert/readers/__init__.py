"""Readers of foreign checkpoints.

A ``Source`` hands over one parameter at a time, so that importing a model never needs the whole model in memory. A new
format is a file in this folder and a line in ``READERS``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .source import Source

__all__ = ["Source", "open_source"]


def _safetensors() -> Callable[[Path], Source]:
    from .safetensors_dir import SafetensorsDirectory

    return SafetensorsDirectory


def _bitsandbytes() -> Callable[[Path], Source]:
    from .bitsandbytes import BitsandbytesDirectory

    return BitsandbytesDirectory


def _int4() -> Callable[[Path], Source]:
    from .int4_dir import Int4Directory

    return Int4Directory


def _gguf() -> Callable[[Path], Source]:
    from .gguf import GgufFile

    return GgufFile


# Readers by what tells the format: a model directory's ``quant_method`` in config.json, or a file's suffix. Each
# imports its module when it is needed.
READERS: dict[tuple[str, str | None], Callable[[], Callable[[Path], Source]]] = {
    ("directory", None): _safetensors,
    ("directory", "bitsandbytes"): _bitsandbytes,
    ("directory", "mebp_int4"): _int4,
    ("file", ".gguf"): _gguf,
}


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a checkpoint: a transformers model directory, float or quantised to 4 bits, or a GGUF file.

    Raises:
        ValueError: it is neither, or something is wrong with it that shows without reading the weights.
    """
    path = Path(path)
    if path.is_dir():
        if all((path / name).exists() for name in ("manifest.json", "shared.safetensors")):
            raise ValueError(f"{path} is a store already: train it, or decode it first by `mebp merge {path} OUT`")
        from .safetensors_dir import quant_method_of

        # The plain reader refuses a method without a reader, by name.
        return READERS.get(("directory", quant_method_of(path)), READERS["directory", None])()(path)
    if path.is_file() and path.suffix != ".safetensors":
        # Any other file is taken for a GGUF, whose reader looks at the first bytes.
        return READERS.get(("file", path.suffix), READERS["file", ".gguf"])()(path)
    if path.exists():
        raise ValueError(f"{path} is not a model: give the directory that holds config.json, or a .gguf file")
    raise ValueError(f"{path} does not exist: give a local model directory or .gguf file (hub names are not fetched)")
