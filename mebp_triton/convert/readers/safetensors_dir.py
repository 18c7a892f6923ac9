"""Reads a transformers model directory: ``config.json`` beside ``model.safetensors`` or its shards.

Opening it checks everything that shows without the weights: the config, the index, and the header of every shard.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
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
from mebp_triton.models.config import check_sizes, prepare_config, read_config, read_json_object
from mebp_triton.models.language_part import parts_left_out
from mebp_triton.models.names import (
    check_complete,
    check_shape,
    current_names,
    enumerate_names,
    parameter_aliases,
    persistent_buffers,
    tensor_shapes,
    warn_unused,
)
from mebp_triton.system import strict_json
from mebp_triton.system.foreign_errors import one_line

from .conversions import Conversion, conversions
from .expert_matrices import ExpertMatrices
from .quantization import KEYS, Quantization, find_quantization
from .source import NativeForm

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
# What lies beside a model and is none; and one of several shards.
NO_MODEL = re.compile(r"adapter_model\.safetensors|.*-\d{5}-of-\d{5}\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HQQ_PICKLE = "qmodel.pt"
FLOATS = ("F64", "F32", "F16", "BF16")
COMPARED_ELEMENTS = 1 << 22  # how much of two tables is compared at a time
DOWNLOAD = "download it again"


@dataclass(frozen=True)
class Entry:
    """A tensor's file, and its form as the header of that file has it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class SafetensorsDirectory:
    """The ``Source`` of a model directory.

    Attributes:
        quant_method: the quantisation that the reader takes, as ``config.json`` calls it; None for float weights.
    """

    quant_method: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = f"safetensors directory {path.resolve().name}"
        self._config_json, self.quantization = _config_json(path, self.quant_method)
        whole = read_config(path, "compare it with the model's original")
        self.config = prepare_config(whole, str(path))
        if self.config is not whole:  # the language model of a larger one
            self._config_json = json.loads(self.config.to_json_string(use_diff=False))
        if self.quantization is not None:
            # What is made of the directory is not quantised in this way any more.
            for key in KEYS:
                self._config_json.pop(key, None)
                vars(self.config).pop(key, None)
        self.decoded: dict[str, str] = {}
        self._entries = _entries(path)
        self.files = sorted({entry.file for entry in self._entries.values()})
        check_sizes(str(path), self.config, (entry.shape for entry in self._entries.values()))
        self._keys: dict[str, str] = {}
        self._made: dict[str, Conversion] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._transposed: set[str] = set()

    @staticmethod
    def native_form(settings: dict[str, Any]) -> NativeForm | None:
        """The form of the codes in a directory with this ``quantization_config``; None for float weights."""
        return None

    def bind(self, model: PreTrainedModel) -> None:
        prefix = model.base_model_prefix + "."
        aliases = parameter_aliases(model)
        names_of_keys = current_names(model, self._entries)
        present = {renamed: key for key, renamed in names_of_keys.items()}
        made = conversions(model, names_of_keys)
        self._model, self._keys, self._made = model, {}, {}
        used: set[str] = set()
        for names in [*aliases.values(), *([name] for name in persistent_buffers(model))]:
            # A checkpoint that was saved from the base model, or with it, has its prefix less, or more.
            spellings = [way for alias in names for way in (alias, prefix + alias, alias.removeprefix(prefix))]
            keys = list(dict.fromkeys(present[way] for way in spellings if way in present))
            conversion = next((made[way] for way in spellings if way in made), None)
            if conversion is not None:
                self._made.update(dict.fromkeys(names, conversion))
                used.update(conversion.keys)
            elif keys:
                self._keys.update(dict.fromkeys(names, keys[0]))
                self._check_tied(keys)
                used.update(keys)
        self._check_experts(aliases, present)
        check_complete(str(self.path), aliases, [*self._keys, *self._made])
        parts = [key for conversion in self._made.values() for key in conversion.keys]
        for key in [*(self._keys[name] for name in aliases if name in self._keys), *parts]:
            entry = self._entries[key]
            if not self._usable(key):
                wanted = ", ".join(FLOATS)
                raise ValueError(
                    f"{entry.file}: {key} is {entry.dtype}, wanted one of {wanted}: give the unquantised model"
                )
        unused = [key for key in self._entries if not self._belongs(key, used)]
        if parts_left_out(model):
            self._warn_of_other_parts(model, unused)
        else:
            warn_unused(str(self.path), model, unused)
        self._shapes = tensor_shapes(model)
        self._experts = ExpertMatrices(self, model, self._keys, self._made)
        self._transposed = {f"{name}.weight" for name, module in model.named_modules() if type(module) is Conv1D}

    def _warn_of_other_parts(self, model: PreTrainedModel, unused: list[str]) -> None:
        """Says what a checkpoint has beside the language model: towers for images and sound, say."""
        if unused:
            size = sum(prod(self._entries[key].shape) for key in unused)
            parts = sorted({".".join(key.removeprefix("model.").split(".")[:1]) for key in unused})
            warnings.warn(
                f"{self.path}: the language model of {type(model).__name__} is taken alone: {len(unused)} tensors with "
                f"{size} values are left out ({enumerate_names(parts)})",
                stacklevel=3,
            )

    def _check_experts(self, wanted: Iterable[str], present: dict[str, str]) -> None:
        """Raises ValueError where a parameter is stored in pieces that nobody joins."""
        for name in wanted:
            parent = name.rpartition(".")[0]
            pieces = [key for key in present if re.match(rf"{re.escape(parent)}\.\d+\.", key)]
            if name not in self._keys and name not in self._made and pieces:
                raise ValueError(
                    f"{self.path}: {name} is stored in pieces ({present[pieces[0]]}), and transformers "
                    f"{transformers.__version__} has no rule by which to join them: such experts are not supported"
                )

    def _check_tied(self, keys: list[str]) -> None:
        """Raises ValueError where a parameter that the config shares is stored several times, with different values."""
        for other in keys[1:]:
            if not self._are_equal(keys[0], other):
                raise ValueError(
                    f"{self._entries[other].file}: {other} differs from {keys[0]}, which config.json says it is: "
                    f"set tie_word_embeddings to false there"
                )

    def _are_equal(self, key: str, other: str) -> bool:
        one, two = self._entries[key], self._entries[other]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        with _opened(one.file) as left, _opened(two.file) as right:
            first, second = left.get_slice(key), right.get_slice(other)
            step = max(1, COMPARED_ELEMENTS // max(1, prod(one.shape[1:])))
            starts = range(0, one.shape[0], step) if one.shape else ()
            return all(torch.equal(first[at : at + step], second[at : at + step]) for at in starts)

    def _belongs(self, key: str, used: set[str]) -> bool:
        """Whether ``key`` is one of ``used``, or a part of one of them."""
        return key in used

    def _usable(self, key: str) -> bool:
        """Whether the tensor ``key`` has a form that can be read."""
        return self._entries[key].dtype in FLOATS

    def has(self, name: str) -> bool:
        return name in self._keys or name in self._made

    def read(self, name: str) -> Tensor | Int4Weight:
        if name in self._experts.places:
            return self._experts.read(name)
        if name in self._experts.parameters:
            return self._experts.read_all(name)
        shape = self._shapes[name]
        if (conversion := self._made.get(name)) is not None:
            parts = {pattern: list(map(self._tensor, keys)) for pattern, keys in conversion.sources.items()}
            value = conversion.apply(parts, self._model, name)
            check_shape(str(self.path), name, value.shape, shape)
            return value
        if name not in self._transposed:
            return self.value(name, self._keys[name], shape)
        value = self.value(name, self._keys[name], shape[::-1])
        return value if isinstance(value, Int4Weight) else value.t()

    def value(self, name: str, key: str, shape: tuple[int, ...]) -> Tensor | Int4Weight:
        """Reads the tensor ``key``, which is the parameter ``name`` or a part of it; see ``expert_matrices.Files``.

        Args:
            shape: its shape, or ``[out, in]`` where that of the parameter is ``[in, out]``.
        """
        entry = self._entries[key]
        stored = shape[::-1] if name in self._transposed else shape
        check_shape(str(entry.file), name, entry.shape, stored)
        return self._tensor(key).t() if name in self._transposed else self._tensor(key)

    def expert_slice(self, key: str, expert: int) -> Tensor:
        """Reads the part ``[1, ...]`` of the tensor ``key`` that an expert has in it."""
        with _opened(self._entries[key].file) as shard:
            part: Tensor = shard.get_slice(key)[expert : expert + 1]
            return part

    def expert_value(self, key: str, expert: int) -> Tensor | Int4Weight:
        """Reads the matrix that an expert has in the parameter that is stored as ``key``; codes as ``[out, in]``."""
        return self.expert_slice(key, expert)[0]

    def _tensor(self, key: str) -> Tensor:
        # The file is opened anew each time: its mapping goes away with the tensor, and so do the pages that were read.
        with _opened(self._entries[key].file) as shard:
            return shard.get_tensor(key)

    def save_companions(self, directory: str | os.PathLike[str]) -> None:
        config = {**self._config_json, "architectures": self.config.architectures}
        config.pop("auto_map", None)
        write_companions(config, self.path, Path(directory))


def method_of_tensors(path: Path) -> str | None:
    """The method that tensors show where nothing states it, as HQQ's do; None for another, or what cannot be read."""
    with contextlib.suppress(ValueError, OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "hqq" if any(key.endswith(".W_q") for key in _entries(path)) else None
    return None


def _config_json(path: Path, quant_method: str | None) -> tuple[dict[str, Any], Quantization | None]:
    """The content of ``config.json``, and the quantisation. ValueError where that is another than ``quant_method``."""
    content = read_json_object(path / "config.json", "give a transformers model directory")
    found = find_quantization(path, content)
    if found is not None and (found.method is None or found.method != quant_method):
        where = f"config.json has a {found.where}" if found.where in KEYS else f"{found.where} states a quantisation"
        raise ValueError(
            f"{path}: {where} ({found.method or 'unnamed'}), which is not supported yet: give the unquantised model"
        )
    return content, found


def _entries(path: Path) -> dict[str, Entry]:
    """Every tensor in the directory: in one file, as transformers prefers, or each in the shard of the index.

    Files of older tools have names of their own, such as ``gptq_model-4bit-128g.safetensors``. They are read where only
    one can be meant.
    """
    if (path / SINGLE).exists():
        if (path / INDEX).exists():
            warnings.warn(
                f"{path}: {SINGLE} is read, as transformers does, and the shards of {INDEX} are not", stacklevel=2
            )
        return _header(_shard(path, SINGLE))
    indices = [path / INDEX] if (path / INDEX).exists() else sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _indexed_entries(indices[0])
    files = [file.name for file in path.glob("*.safetensors") if not NO_MODEL.fullmatch(file.name)]
    if len(files) == 1:
        return _header(_shard(path, files[0]))
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        way = "save it with save_pretrained as safetensors"
        if HQQ_PICKLE in pickles:
            way = "save it with HQQ's AutoHQQHFModel.save_to_safetensors"
        raise ValueError(
            f"{path} has only pickled weights ({pickles[0]}), which can run code when opened: load the model once "
            f"where you trust it and {way}"
        )
    raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}: give a directory with safetensors weights")


def _indexed_entries(index: Path) -> dict[str, Entry]:
    weight_map = read_json_object(index, DOWNLOAD).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map of tensor names to shards; {DOWNLOAD}")
    shards = [_shard(index.parent, name, index.name) for name in weight_map.values()]
    entries: dict[str, Entry] = {}
    for shard in dict.fromkeys(shards):
        for key, entry in _header(shard).items():
            if weight_map.get(key, shard.name) != shard.name or key in entries:
                raise ValueError(f"{shard} has {key}, which {index.name} has in {weight_map.get(key)}; {DOWNLOAD}")
            entries[key] = entry
    check_complete(f"the shards listed in {index}", weight_map, entries)
    return entries


def _shard(path: Path, name: object, index: str = INDEX) -> Path:
    """The path of a shard. Its name comes from a file, so it must not lead out of the directory."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\\0"):
        raise ValueError(f"{path / index}: shard {name!r:.200} is not a plain *.safetensors file name; {DOWNLOAD}")
    # Hub caches hold links to files, which may be followed, but not to a FIFO, say.
    if not (path / name).is_file():
        raise ValueError(f"{path / name} is missing or not a regular file; {DOWNLOAD}")
    return path / name


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with (
        one_line(f"{file} is not a whole safetensors file", DOWNLOAD),
        safe_open(str(file), framework="pt", device="cpu") as shard,
    ):
        yield shard


def _header(file: Path) -> dict[str, Entry]:
    """The tensors of a shard. safetensors compares the header with the file's size, which finds a truncated shard.

    Files by others are read, so safetensors' own reader is used: it knows every dtype and the older alignments. But of
    two tensors of one name it takes the last, so the header is parsed strictly as well.
    """
    with _opened(file) as shard:
        keys = list(shard.keys())
        slices = {key: shard.get_slice(key) for key in keys}
        entries = {key: Entry(file, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        strict_json.parse_json(opened.read(length), f"header of {file}")
    return entries
