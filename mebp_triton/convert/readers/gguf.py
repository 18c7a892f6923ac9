"""Reads GGUF files. Matrices whose type an ``Int4Weight`` holds are taken over bit for bit; others become float32.

Names, tokenizers and what an architecture does to its matrices come from transformers and the ``gguf`` package. The
header is read by our own code: ``gguf.GGUFReader`` makes an array of every vocabulary entry, which takes seconds, and
loops on a corrupt length. So is the config: transformers' reader of GGUF leaves out most of what a file states.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.models.config import check_sizes, prepare_config
from mebp_triton.models.experts import expert_places
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
from .gguf_layout import SAFETENSORS, GgufLayout
from .gguf_parts import read_model
from .gguf_rope import FREQS, LONG, SHORT, rope_settings
from .gguf_tokenizer import check_tokens, generation_config, token_ids, tokenizer_of

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
        self._layout = GgufLayout(self._arch, self.config, str(path))
        self._entries: dict[str, list[Entry]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._experts: dict[str, tuple[str, int]] = {}
        self._joined: tuple[str, Tensor] | None = None  # the parameter of all experts that was read last

    def bind(self, model: PreTrainedModel) -> None:
        stored: dict[str, list[Entry]] = {}
        placed: set[str] = set()
        for gguf_name, name in self._layout.names(model).items():
            entry = self._header.tensors.get(gguf_name) or self._header.tensors.get(gguf_name + ".weight")
            if entry is not None:
                stored.setdefault(name, []).append(entry)
                placed.add(entry.name)
        aliases = parameter_aliases(model)
        wanted = {name: [name] for name in persistent_buffers(model)} | aliases
        entries = {name: [stored[alias] for alias in names if alias in stored] for name, names in wanted.items()}
        self._entries = {alias: ways[0] for name, ways in entries.items() if ways for alias in wanted[name]}
        check_complete(str(self.path), aliases, self._entries)
        self._check_all_used(placed)
        self._shapes = tensor_shapes(model)
        for name, stored_as in ((name, ways[0]) for name, ways in entries.items() if ways):
            self._check_sizes(name, stored_as)
        self._experts = expert_places(model)

    def has(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> Tensor | Int4Weight:
        if name in self._experts:
            return self._expert(name, *self._experts[name])
        entries = self._entries[name]
        order = self._row_order(entries[0]) if len(entries) == 1 else None
        value = self._decode(entries) if order is None else self._rows(entries[0], order)
        if not isinstance(value, Int4Weight) and (kind := entries[0].kind) not in FLOATS:
            # Of the types that we hold, only matrices that the architecture changed come here.
            self.decoded[name] = f"transposed {kind}" if kind in TYPES else kind
        check_shape(str(self.path), name, value.shape, self._shapes[name])
        return value

    def _expert(self, name: str, parameter: str, expert: int) -> Tensor:
        """One expert's matrix in float32, of the joined parameter, which is kept until another is asked for."""
        if self._joined is None or self._joined[0] != parameter:
            self._joined = None  # there are never two
            value = self.read(parameter)
            assert isinstance(value, Tensor)  # no codes have three dimensions
            self._joined = parameter, value
        if parameter in self.decoded:
            self.decoded[name] = self.decoded[parameter]
        return self._joined[1][expert]

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

    def _decode(self, entries: list[Entry]) -> Tensor:
        """The parameter in float32 that one tensor, or several parts of it, hold."""
        made: dict[str, Tensor] = {}
        for entry in entries:
            with one_line(f"{self.path}: {entry.name} of type {entry.kind} cannot be decoded", "use another GGUF type"):
                processed = self._layout.process(entry.name, self._float(entry), made)
            if processed is not None:
                return torch.from_numpy(np.ascontiguousarray(processed))
        (value,) = made.values()
        return value

    def _row_order(self, entry: Entry) -> Tensor | None:
        """The row of the file that each row of the parameter comes from; None if the codes cannot be kept.

        Codes can be kept if rows only changed places and columns stayed, because a group of codes with one scale lies
        along a row. A matrix may have been transposed (GPT-2), or its values changed.
        """
        if entry.kind not in TYPES or len(entry.shape) != 2:
            return None
        return self._layout.row_order(entry.name, entry.shape)

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


def _check_supported(path: Path, header: Header) -> None:
    """Raises ValueError where the file cannot be used."""
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES or ARCHITECTURES[arch].model_type not in CONFIG_MAPPING:
        raise ValueError(f"{path}: GGUF architecture {arch!r:.100} is not supported; {SAFETENSORS}")
