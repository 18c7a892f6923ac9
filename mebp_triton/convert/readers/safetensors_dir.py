"""A transformers model directory: ``config.json`` beside ``model.safetensors`` or its shards.

Everything that shows without the weights is checked when it is opened: the config, the index, every shard's header.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mebp_triton.convert.companions import write_companions
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.models.config import check_sizes, prepare_config, read_config
from mebp_triton.models.names import (
    check_complete,
    check_shape,
    current_names,
    parameter_aliases,
    persistent_buffers,
    warn_unused,
)
from mebp_triton.system import strict_json
from mebp_triton.system.foreign_errors import one_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = ("F64", "F32", "F16", "BF16")
ROWS_ELEMENTS = 1 << 22  # of two tables that are compared, at a time


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, by its shard's header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class SafetensorsDirectory:
    """The ``Source`` of a model directory.

    Attributes:
        quant_method: of ``quantization_config`` in ``config.json``; a subclass reads another one.
    """

    quant_method: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = f"safetensors directory {path.resolve().name}"
        self._config_json = _config_json(path, self.quant_method)
        self.config = prepare_config(read_config(path, "compare it with the model's original"), str(path))
        self._entries = _entries(path)
        check_sizes(str(path), self.config, (entry.shape for entry in self._entries.values()))
        self._keys: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._transposed: set[str] = set()

    def bind(self, model: PreTrainedModel) -> None:
        prefix = model.base_model_prefix + "."
        aliases = parameter_aliases(model)
        present = {renamed: key for key, renamed in current_names(model, self._entries).items()}
        self._keys = {}
        used: set[str] = set()
        for name, names in [*aliases.items(), *((name, [name]) for name in persistent_buffers(model))]:
            spellings = [way for alias in names for way in (alias, prefix + alias, alias.removeprefix(prefix))]
            found = list(dict.fromkeys(present[way] for way in spellings if way in present))
            if found:
                self._keys[name] = found[0]
                self._check_tied(found)
                used.update(found)
        self._check_experts(aliases, present)
        check_complete(str(self.path), aliases, self._keys)
        for key in (self._keys[name] for name in aliases):
            entry = self._entries[key]
            if not self._usable(key):
                raise ValueError(
                    f"{entry.file}: {key} is {entry.dtype}, wanted one of {FLOATS}: give the unquantised model"
                )
        warn_unused(str(self.path), model, (key for key in self._entries if not self._is_part(key, used)))
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._transposed = {f"{name}.weight" for name, module in model.named_modules() if type(module) is Conv1D}

    def _check_experts(self, wanted: Iterable[str], present: dict[str, str]) -> None:
        """ValueError where a parameter lies in several pieces, which transformers 5 joins while it loads."""
        for name in wanted:
            parent = name.rpartition(".")[0]
            pieces = [key for key in present if re.match(rf"{re.escape(parent)}\.\d+\.", key)]
            if name not in self._keys and pieces:
                raise ValueError(
                    f"{self.path}: {name} is there in pieces ({present[pieces[0]]}), which transformers "
                    f"{transformers.__version__} joins while loading; such mixtures of experts are not supported"
                )

    def _check_tied(self, keys: list[str]) -> None:
        """ValueError where a parameter that the config shares is there under several names, and not the same."""
        for other in keys[1:]:
            if not self._is_same(keys[0], other):
                raise ValueError(
                    f"{self._entries[other].file}: {other} differs from {keys[0]}, which config.json says it is: "
                    f"set tie_word_embeddings to false there"
                )

    def _is_same(self, key: str, other: str) -> bool:
        one, two = self._entries[key], self._entries[other]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        with _opened(one.file) as left, _opened(two.file) as right:
            first, second = left.get_slice(key), right.get_slice(other)
            step = max(1, ROWS_ELEMENTS // max(1, prod(one.shape[1:])))
            starts = range(0, one.shape[0], step) if one.shape else ()
            return all(torch.equal(first[at : at + step], second[at : at + step]) for at in starts)

    def _is_part(self, key: str, used: set[str]) -> bool:
        """Whether ``key`` is one of ``used``, or belongs to one of them."""
        return key in used

    def _int4_shape(self, name: str) -> tuple[int, ...]:
        """``[out, in]``, as 4-bit forms store it, also where the float parameter is ``[in, out]``."""
        return self._shapes[name][:: -1 if name in self._transposed else 1]

    def _usable(self, key: str) -> bool:
        return self._entries[key].dtype in FLOATS

    def has(self, name: str) -> bool:
        return name in self._keys

    def read(self, name: str) -> Tensor | Int4Weight:
        entry = self._entries[self._keys[name]]
        check_shape(str(entry.file), name, entry.shape, self._shapes[name])
        return self._tensor(self._keys[name])

    def _tensor(self, key: str) -> Tensor:
        # Opened anew each time: the map goes away with the tensor, so pages of what was read before do not add up.
        with _opened(self._entries[key].file) as shard:
            return shard.get_tensor(key)

    def save_companions(self, directory: str | os.PathLike[str]) -> None:
        config = {**self._config_json, "architectures": self.config.architectures}
        config.pop("auto_map", None)
        write_companions(config, self.path, Path(directory))


def quant_method_of(path: Path) -> str | None:
    """What ``config.json`` says the directory's weights were quantised by, if it can be read and says so."""
    with contextlib.suppress(ValueError, OSError):
        settings = _json_object(path / "config.json", "").get("quantization_config")
        return settings.get("quant_method") if isinstance(settings, dict) else None
    return None


def _json_object(file: Path, remedy: str) -> dict[str, Any]:
    # A FIFO in a file's place would block the reader for ever.
    if not file.is_file():
        raise ValueError(f"{file} is missing or not a regular file; {remedy}")
    content = strict_json.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, wanted an object; {remedy}")
    return content


def _config_json(path: Path, quant_method: str | None = None) -> dict[str, Any]:
    content = _json_object(path / "config.json", "give a transformers model directory")
    for key in ("quantization_config", "compression_config"):
        if content.get(key):
            method = content[key].get("quant_method") if isinstance(content[key], dict) else None
            if method is not None and method == quant_method:
                continue
            raise ValueError(
                f"{path / 'config.json'} has a {key} ({method or 'unnamed'}), "
                f"which is not supported yet: give the unquantised model"
            )
    return content


def _entries(path: Path) -> dict[str, Entry]:
    """Every tensor in the directory, each in the shard that the index names."""
    if (path / INDEX).exists():
        weight_map = _json_object(path / INDEX, "download it again").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path / INDEX} has no weight_map of tensor names to shards; download it again")
        headers = {
            name: _header(_shard(path, name))
            for name in dict.fromkeys(str(_hashable(name)) for name in weight_map.values())
        }
        entries: dict[str, Entry] = {}
        for name, header in headers.items():
            for key, entry in header.items():
                if weight_map.get(key, name) != name or key in entries:
                    raise ValueError(
                        f"{path / name} has {key}, which {INDEX} has in {weight_map.get(key)}; download it again"
                    )
                entries[key] = entry
        check_complete(f"the shards listed in {path / INDEX}", weight_map, entries)
        return entries
    if (path / SINGLE).exists():
        return _header(_shard(path, SINGLE))
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        raise ValueError(
            f"{path} has only pickled weights ({pickles[0]}), which can run code when opened: load the model once "
            f"where you trust it and save it with save_pretrained as safetensors"
        )
    raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}: give a directory with safetensors weights")


def _hashable(name: object) -> object:
    return name if isinstance(name, str) else repr(name)


def _shard(path: Path, name: object) -> Path:
    """A shard's path. Its name comes from a file, so it may not lead out of the directory."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\\0"):
        raise ValueError(f"{path / INDEX}: shard {name!r:.200} is no plain *.safetensors file name; download it again")
    # Hub caches hold links to files, which is fine; anything but a file at the end of the link is not.
    if not (path / name).is_file():
        raise ValueError(f"{path / name} is missing or not a regular file; download it again")
    return path / name


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with (
        one_line(f"{file} is not a whole safetensors file", "download it again"),
        safe_open(str(file), framework="pt", device="cpu") as shard,
    ):
        yield shard


def _header(file: Path) -> dict[str, Entry]:
    """Opening compares the header with the file's size, so a truncated shard is found here."""
    with _opened(file) as shard:
        keys = list(shard.keys())
        slices = {key: shard.get_slice(key) for key in keys}
        found = {key: Entry(file, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    with open(file, "rb") as opened:  # safetensors takes the last of two tensors of one name
        length = int.from_bytes(opened.read(8), "little")
        strict_json.parse_json(opened.read(length), f"header of {file}")
    return found
