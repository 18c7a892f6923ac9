"""Readers of foreign checkpoints: a transformers model directory (with 4-bit weights too), or a GGUF file.

A ``Source`` hands over one parameter at a time, so importing a model never needs the whole model in memory.
"""

from __future__ import annotations

import os
from pathlib import Path

from .source import Source

__all__ = ["Source", "open_source"]


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a directory with ``config.json`` and safetensors files (float, or 4-bit: bitsandbytes' or ours), or a GGUF.

    Raises:
        ValueError: it is neither, or something is wrong with it that shows without reading the weights.
    """
    path = Path(path)
    if path.is_dir():
        if all((path / name).exists() for name in ("manifest.json", "shared.safetensors")):
            raise ValueError(f"{path} is a store already: train it, or decode it first by `mebp merge {path} OUT`")
        from .bitsandbytes import BitsandbytesDirectory
        from .int4_dir import Int4Directory
        from .safetensors_dir import SafetensorsDirectory, quant_method_of

        quantised: tuple[type[SafetensorsDirectory], ...] = (BitsandbytesDirectory, Int4Directory)
        readers = {reader.quant_method: reader for reader in quantised}
        return readers.get(quant_method_of(path), SafetensorsDirectory)(path)
    if path.is_file() and path.suffix != ".safetensors":
        from .gguf import GgufFile

        return GgufFile(path)
    if path.exists():
        raise ValueError(f"{path} is no model: give the directory that holds config.json, or a .gguf file")
    raise ValueError(f"{path} does not exist: give a local model directory or .gguf file (hub names are not fetched)")
