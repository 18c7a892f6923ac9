"""Readers of foreign checkpoints.

A ``Source`` hands over one parameter at a time, so that importing a model never needs the whole model in memory. A new
format is a file in this folder and a line in ``READERS``.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from .source import Source

__all__ = ["Source", "open_source"]

# Module and class by what tells the format: a model directory's ``quant_method`` in config.json, or a file's suffix.
# A module is imported only when it is needed.
READERS = {
    ("directory", None): "safetensors_dir:SafetensorsDirectory",
    ("directory", "bitsandbytes"): "bitsandbytes:BitsandbytesDirectory",
    ("directory", "mebp_int4"): "int4_dir:Int4Directory",
    ("file", ".gguf"): "gguf:GgufFile",
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
        return _opened(READERS.get(("directory", quant_method_of(path)), READERS["directory", None]), path)
    if path.is_file() and path.suffix != ".safetensors":
        # Any other file is taken for a GGUF, whose reader looks at the first bytes.
        return _opened(READERS.get(("file", path.suffix), READERS["file", ".gguf"]), path)
    if path.exists():
        raise ValueError(f"{path} is not a model: give the directory that holds config.json, or a .gguf file")
    raise ValueError(f"{path} does not exist: give a local model directory or .gguf file (hub names are not fetched)")


def _opened(reader: str, path: Path) -> Source:
    module, _, name = reader.partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), name)(path)
