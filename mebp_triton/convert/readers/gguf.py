"""Reads GGUF files. Matrices whose type an ``Int4Weight`` holds are taken over bit for bit; others become float32.

Names, tokenizers and what an architecture does to its matrices come from transformers and the ``gguf`` package. The
header is read by our own code: ``gguf.GGUFReader`` makes an array of every vocabulary entry, which takes seconds, and
loops on a corrupt length. So is the config: transformers' reader of GGUF leaves out most of what a file states.
"""

from __future__ import annotations

import inspect
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.models.config import check_sizes, prepare_config
from mebp_triton.models.names import (
    check_complete,
    check_shape,
    enumerate_names,
    parameter_aliases,
    persistent_buffers,
    tensor_shapes,
)
from mebp_triton.system.foreign_errors import one_line
from mebp_triton.system.memory import return_free_memory

from .coded_matrix import CodedMatrix
from .gguf_architectures import ARCHITECTURES
from .gguf_blocks import TYPES, read_blocks
from .gguf_header import DOWNLOAD, Entry, Header
from .gguf_keys import settings_of
from .gguf_parts import read_model
from .gguf_rope import FREQS, LONG, SHORT, rope_settings
from .gguf_tokenizer import check_tokens, generation_config, token_ids, tokenizer_of

SAFETENSORS = "give the model as safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


class GgufFile:
    """The ``Source`` of a GGUF file, or of all parts of a model if the file is one of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = read_model(path)
        self._arch = str(self._header.metadata.get("general.architecture"))
        self.description = f"GGUF {self._header.path.name} ({self._arch})"
        _check_supported(path, self._header)
        check_tokens(self._header.metadata, str(path))
        self.config = prepare_config(self._config(), str(path))
        check_sizes(str(path), self.config, (entry.shape for entry in self._header.tensors.values()))
        self.decoded: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._entries: dict[str, list[Entry]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, model: PreTrainedModel) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._processor = TENSOR_PROCESSORS.get(self._arch, TensorProcessor)(config=self.config.to_dict())
        # transformers 4 has no such parameter, and no processor in need of it.
        takes_processor = "processor" in inspect.signature(get_gguf_hf_weights_map).parameters
        extra: dict[str, Any] = {"processor": self._processor} if takes_processor else {}
        with one_line(f"{self.path}: no tensor names for architecture {self._arch!r}", SAFETENSORS):
            self._names = get_gguf_hf_weights_map(_Outline(model), **extra)
        stored: dict[str, list[Entry]] = {}
        placed: set[str] = set()
        for gguf_name, name in self._names.items():
            # Fused experts are one parameter, whose name has no ".weight"; a file has them as several tensors with it.
            entry = self._header.tensors.get(gguf_name) or self._header.tensors.get(gguf_name + ".weight")
            if entry is not None:
                stored.setdefault(name, []).append(entry)
                placed.add(entry.name)
        aliases = parameter_aliases(model)
        wanted = {name: [name] for name in persistent_buffers(model)} | aliases
        entries = {name: [stored[alias] for alias in names if alias in stored] for name, names in wanted.items()}
        self._entries = {name: ways[0] for name, ways in entries.items() if ways}
        check_complete(str(self.path), aliases, self._entries)
        self._check_all_used(placed)
        self._shapes = tensor_shapes(model)
        for name, stored_as in self._entries.items():
            self._check_sizes(name, stored_as)

    def has(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> Tensor | Int4Weight:
        entries = self._entries[name]
        order = self._row_order(entries[0]) if len(entries) == 1 else None
        value = self._decode(entries) if order is None else self._rows(entries[0], order)
        if not isinstance(value, Int4Weight) and (kind := entries[0].kind) not in FLOATS:
            # Of the types that we hold, only matrices that the architecture changed come here.
            self.decoded[name] = f"transposed {kind}" if kind in TYPES else kind
        check_shape(str(self.path), name, value.shape, self._shapes[name])
        return value

    def save_companions(self, directory: str | os.PathLike[str]) -> None:
        self.config.save_pretrained(str(directory))
        if not self._header.metadata.get("tokenizer.ggml.tokens"):
            return
        with one_line(f"{self.path} gives no tokenizer", SAFETENSORS):
            tokenizer = tokenizer_of(self._header.path, self._header.metadata, str(self.path))
        tokenizer.save_pretrained(str(directory))
        generation_config(tokenizer, self._header.metadata).save_pretrained(str(directory))
        del tokenizer
        return_free_memory()  # what a large vocabulary leaves is in pieces, in which no matrix finds room

    def _config(self) -> PretrainedConfig:
        """The config that the metadata, and the tensors of RoPE's factors, describe."""
        metadata, tensors, where = self._header.metadata, self._header.tensors, str(self.path)
        known = ARCHITECTURES[self._arch]
        settings = settings_of(known, self._arch, metadata, tensors, where)
        prefix = self._arch + "."
        stated = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        factors = {name: self._float(tensors[name]) for name in self._rope_tensors() if name in tensors}
        try:
            settings |= rope_settings(known, stated, settings, factors)
        except ValueError as error:
            raise ValueError(f"{where}: {prefix if str(error).startswith('rope.') else ''}{error}") from error
        if (embedding := tensors.get("token_embd.weight")) is not None:
            settings["vocab_size"] = metadata.get("tokenizer.ggml.tokens") or embedding.shape[0]
        settings["tie_word_embeddings"] = "output.weight" not in tensors
        settings |= {f"{name}_token_id": None for name in ("bos", "eos", "pad")} | token_ids(metadata)
        with one_line(f"{where} gives no config for architecture {self._arch!r}", SAFETENSORS):
            return CONFIG_MAPPING[known.model_type](**settings)

    def _rope_tensors(self) -> list[str]:
        """The names of the tensors of RoPE's factors that the architecture has."""
        factors = ARCHITECTURES[self._arch].factors
        return [FREQS] * ("freqs" in factors) + [LONG, SHORT] * ("long" in factors)

    def _check_all_used(self, placed: set[str]) -> None:
        """Raises ValueError where the file has a tensor that the model has no place for."""
        unused = sorted(self._header.tensors.keys() - placed - set(self._rope_tensors()))
        if unused:
            names = enumerate_names(unused)
            raise ValueError(f"{self.path}: the model that its keys describe has no {names}; {SAFETENSORS}")

    def _check_sizes(self, name: str, entries: list[Entry]) -> None:
        """Raises ValueError where a parameter's tensors cannot be it, whatever the architecture does to their shapes.

        Shapes are transposed and get sides of 1; tensors of experts are joined.
        """
        wanted, shapes = self._shapes[name], [entry.shape for entry in entries]
        sides = [sorted(side for side in shape if side != 1) for shape in (*shapes, wanted)]
        same = sides[0] == sides[-1] if len(shapes) == 1 else sum(map(math.prod, shapes)) == math.prod(wanted)
        if not same:
            check_shape(str(self.path), name, shapes[0] if len(shapes) == 1 else (len(shapes), *shapes[0]), wanted)

    def _float(self, entry: Entry) -> np.ndarray:
        """A tensor's values in float32, as the file has them."""
        from gguf import GGMLQuantizationType, dequantize

        if entry.kind in TYPES:
            return self._matrix(entry).decode().view(entry.shape).numpy()
        return dequantize(self._bytes(entry).reshape(*entry.shape[:-1], -1), GGMLQuantizationType[entry.kind])

    def _bytes(self, entry: Entry, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The bytes of a tensor's rows from ``start`` to before ``stop``, ``[rows, bytes of a row]``.

        They are read, not mapped: if the file has been cut short since, that is an error here and a SIGBUS in a map.
        """
        count = math.prod(entry.shape[:-1])
        width = entry.nbytes // count
        data = np.empty(((count if stop is None else stop) - start, width), np.uint8)
        with open(entry.path, "rb") as file:
            file.seek(entry.offset + start * width)
            if file.readinto(data.data) != data.nbytes:
                raise ValueError(f"{entry.path} ends inside {entry.name}; {DOWNLOAD}")
        return data

    def _process(self, entry: Entry, values: np.ndarray, made: dict[str, Tensor]) -> np.ndarray | None:
        """Undoes what the converter to GGUF did to a tensor, by transformers' code for the architecture.

        Returns None where that code put its result into ``made`` instead, as it does with experts.
        """
        result = self._processor.process(
            weights=values, name=entry.name, tensor_key_mapping=self._names, parsed_parameters={"tensors": made}
        )
        return None if result.name is None else result.weights

    def _decode(self, entries: list[Entry]) -> Tensor:
        """The parameter in float32 that one tensor, or several parts of it, hold."""
        made: dict[str, Tensor] = {}
        for entry in entries:
            with one_line(f"{self.path}: {entry.name} of type {entry.kind} cannot be decoded", "use another GGUF type"):
                processed = self._process(entry, self._float(entry), made)
            if processed is not None:
                return torch.from_numpy(np.ascontiguousarray(processed))
        (value,) = made.values()
        return value

    def _row_order(self, entry: Entry) -> Tensor | None:
        """The row of the file that each row of the parameter comes from; None if the codes cannot be kept.

        A converter may have permuted rows (Llama's queries and keys), transposed a matrix (GPT-2) or changed its
        values. What an architecture does is not looked up but observed: a matrix that holds its own row numbers, and
        one that holds its column numbers, go through transformers' code for undoing it. Codes can be kept if rows only
        changed places and columns stayed, because a group of codes with one scale lies along a row.
        """
        if entry.kind not in TYPES or len(entry.shape) != 2:
            return None
        rows, columns = (np.arange(size, dtype=np.float32) for size in entry.shape)
        row_numbers = np.broadcast_to(rows[:, None], entry.shape)
        moved = self._process(entry, row_numbers, {})
        if moved is row_numbers:
            return torch.arange(entry.shape[0])
        beside = self._process(entry, np.broadcast_to(columns, entry.shape), {})
        if moved is None or beside is None or moved.shape != entry.shape or beside.shape != entry.shape:
            return None
        order = moved[:, 0]
        whole_rows = np.array_equal(moved, np.broadcast_to(order[:, None], entry.shape))
        if not whole_rows or not np.array_equal(np.sort(order), rows) or not (beside == columns).all():
            return None
        return torch.from_numpy(order.astype(np.int64))

    def _matrix(self, entry: Entry) -> CodedMatrix:
        """The codes and scales of a tensor of one of ``TYPES``, ``[rows, row]``."""
        shape = math.prod(entry.shape[:-1]), entry.shape[-1]
        return read_blocks(entry.kind, shape, lambda *rows: torch.from_numpy(self._bytes(entry, *rows)))

    def _rows(self, entry: Entry, order: Tensor) -> Tensor | Int4Weight:
        """A matrix of one of ``TYPES``, its rows taken in ``order``; in float32 where our layout cannot hold it."""
        matrix = self._matrix(entry)
        weight = matrix.to_int4()
        value = matrix.decode() if weight is None else weight
        if not bool((order[1:] < order[:-1]).any()):
            return value
        return value.gather(order) if isinstance(value, Int4Weight) else value[order]


class _Outline:
    """The two upper levels of a model, to be shown to ``get_gguf_hf_weights_map`` in its place.

    That function descends into every submodule, in case the file was made from the base model, and makes the table of
    all names anew in each. This takes seconds for a small model and minutes for a deep one. A base model is near the
    top, so two levels are enough.
    """

    def __init__(self, module: torch.nn.Module, levels: int = 2) -> None:
        self.config = getattr(module, "config", None)
        self.state_dict = module.state_dict
        self._children = dict(module.named_children()) if levels else {}
        self._levels = levels

    def named_children(self) -> list[tuple[str, _Outline]]:
        return [(name, _Outline(child, self._levels - 1)) for name, child in self._children.items()]


def _check_supported(path: Path, header: Header) -> None:
    """Raises ValueError where the file cannot be used."""
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES or ARCHITECTURES[arch].model_type not in CONFIG_MAPPING:
        raise ValueError(f"{path}: GGUF architecture {arch!r:.100} is not supported; {SAFETENSORS}")
