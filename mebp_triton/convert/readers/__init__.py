"""Readers of foreign checkpoints.

A ``Source`` hands over one parameter at a time, so that importing a model never needs the whole model in memory. A new
format is a file in this folder and a line in ``READERS``.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from .quantization import KEYS, quantization_in, quantization_of
from .source import NativeForm, Source

__all__ = ["NativeForm", "Source", "is_quantized", "native_form", "open_source", "state_quantization"]


# Readers, as module and class, by what tells the format: a model directory's ``quant_method`` in config.json, or the
# suffix of a file. The module is imported when it is needed.
READERS: dict[tuple[str, str | None], tuple[str, str]] = {
    ("directory", None): ("safetensors_dir", "SafetensorsDirectory"),
    ("directory", "bitsandbytes"): ("bitsandbytes", "BitsandbytesDirectory"),
    ("directory", "mebp_int4"): ("int4_dir", "Int4Directory"),
    ("directory", "gptq"): ("gptq", "GptqDirectory"),
    ("directory", "awq"): ("awq", "AwqDirectory"),
    ("directory", "auto-round"): ("auto_round", "AutoRoundDirectory"),
    ("directory", "mlx"): ("mlx", "MlxDirectory"),
    ("directory", "compressed-tensors"): ("compressed_tensors", "CompressedTensorsDirectory"),
    ("directory", "hqq"): ("hqq", "HqqDirectory"),
    ("directory", "mxfp4"): ("mxfp4", "Mxfp4Directory"),
    ("file", ".gguf"): ("gguf", "GgufFile"),
}


def reader_of(kind: str, name: str | None) -> Any:
    """The class that reads a format, see ``READERS``; of an unknown one, the plain reader, which refuses it by name."""
    plain = {"directory": None, "file": ".gguf"}[kind]
    module, reader = READERS.get((kind, name), READERS[kind, plain])
    return getattr(importlib.import_module(f".{module}", __package__), reader)


def native_form(config: Any) -> NativeForm | None:
    """The form of the 4-bit codes that a directory with this config holds; None where its weights are floats."""
    found = quantization_in(vars(config))
    if found is None:
        return None
    form: NativeForm | None = reader_of("directory", found.method).native_form(found.settings)
    return form


def is_quantized(config: Any) -> bool:
    """Whether a directory with this config holds codes in place of weights."""
    return quantization_in(vars(config)) is not None


def state_quantization(config: Any, path: Path) -> None:
    """Adds to the config of the directory ``path`` what is said of its quantisation elsewhere than in ``config.json``.

    GPTQ and AWQ had files of their own; HQQ's tensors alone show it.
    """
    if not is_quantized(config) and (method := _method(path)) is not None:
        found = quantization_of(path)
        setattr(config, KEYS[0], {**(found.settings if found else {}), "quant_method": method})


def _method(path: Path) -> str | None:
    """The method by which the weights in a directory were quantised, by what states it or by its tensors."""
    from .safetensors_dir import method_of_tensors

    found = quantization_of(path)
    return (found.method if found else None) or method_of_tensors(path)


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a checkpoint: a transformers model directory, float or quantised to 4 bits, or a GGUF file.

    Raises:
        ValueError: it is neither, or something is wrong with it that shows without reading the weights.
    """
    path = Path(path)
    if path.is_dir():
        if all((path / name).exists() for name in ("manifest.json", "shared.safetensors")):
            raise ValueError(f"{path} is a store already: train it, or decode it first by `mebp merge {path} OUT`")
        if not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
            raise ValueError(f"{path} is a directory of GGUF files: give one of them, such as {files[0]}")
        source: Source = reader_of("directory", _method(path))(path)
        return source
    if path.is_file() and path.suffix != ".safetensors":
        # Any other file is taken for a GGUF, whose reader looks at the first bytes.
        source = reader_of("file", path.suffix)(path)
        return source
    if path.exists():
        raise ValueError(f"{path} is not a model: give the directory that holds config.json, or a .gguf file")
    raise ValueError(f"{path} does not exist: give a local model directory or .gguf file (hub names are not fetched)")
