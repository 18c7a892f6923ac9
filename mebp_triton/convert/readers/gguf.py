"""Reads GGUF files. Matrices whose type an ``Int4Weight`` holds are taken over bit for bit; others become float32.

Names, tokenizers and what an architecture does to its matrices come from transformers and the ``gguf`` package. The
header is read by our own code: ``gguf.GGUFReader`` makes an array of every vocabulary entry, which takes seconds, and
loops on a corrupt length. So is the config: transformers' reader of GGUF leaves out most of what a file states.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.models.config import check_sizes, prepare_config
from mebp_triton.models.experts import expert_places, fused_experts
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

from .coded_matrix import CodedMatrix, is_sorted, stack
from .gguf_architectures import ARCHITECTURES
from .gguf_blocks import TYPES, read_blocks
from .gguf_header import DOWNLOAD, Entry, Header
from .gguf_keys import settings_of
from .gguf_layout import SAFETENSORS, GgufLayout, Order
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
        self.files = self._header.files
        self.decoded: dict[str, str] = {}
        self._layout = GgufLayout(self._arch, self.config, str(path))
        self._entries: dict[str, list[Entry]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[str, int]] = {}  # of experts in their parameter
        self._transposed: set[str] = set()  # parameters of experts that are [experts, in, out]
        self._orders: dict[str, Order | None] = {}

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
        self._places = expert_places(model)
        turned = (experts for experts in fused_experts(model) if experts.transposed)
        self._transposed = {f"{experts.path}.{parameter}" for experts in turned for parameter in experts.shapes}

    def has(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> Tensor | Int4Weight:
        parameter, expert = self._places.get(name, (name, None))
        entries, shape = self._entries[parameter], self._shapes[parameter][0 if expert is None else 1 :]
        turned = parameter in self._transposed
        matrix = self._coded(entries, expert, turned)
        value = self._floats(entries, expert, shape) if matrix is None else matrix.to_int4()
        if value is None:
            assert matrix is not None
            value = matrix.decode().t() if turned else matrix.decode()
        elif matrix is None and (kinds := {entry.kind for entry in entries} - set(FLOATS)):
            # Of the types that we hold, only matrices that the architecture changed come here.
            changed = "transposed " if len(kinds) == 1 and kinds <= TYPES.keys() else ""
            self.decoded[name] = changed + " and ".join(sorted(kinds))
        wanted = shape[::-1] if turned and isinstance(value, Int4Weight) else shape
        check_shape(str(self.path), name, value.shape, wanted)
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
            raise ValueError(
                f"{where}: {prefix if str(error).startswith(('rope.', 'attention.')) else ''}{error}"
            ) from error
        if (embedding := tensors.get("token_embd.weight")) is not None:
            size = metadata.get("tokenizer.ggml.tokens") or embedding.shape[0]
            settings |= dict.fromkeys(("vocab_size", *known.vocabularies), size)
        settings["tie_word_embeddings"] = "output.weight" not in tensors
        settings |= {f"{name}_token_id": None for name in ("bos", "eos", "pad")} | token_ids(metadata)
        with one_line(f"{where} gives no config for architecture {self._arch!r}", SAFETENSORS):
            return CONFIG_MAPPING[settings.pop("model_type", known.model_type)](**settings)

    def _rope_tensors(self) -> list[str]:
        """The names of the tensors of RoPE's factors that the architecture has."""
        factors = ARCHITECTURES[self._arch].factors
        return [FREQS] * ("freqs" in factors) + [LONG, SHORT] * ("long" in factors)

    def _check_all_used(self, placed: set[str]) -> None:
        """Raises ValueError where the file has a tensor that the model has no place for."""
        unused = sorted(self._header.tensors.keys() - placed - set(self._rope_tensors()))
        if self._header.metadata.get(f"{self._arch}.nextn_predict_layers"):
            layers = self.config.num_hidden_layers
            blocks = {name: re.match(r"blk\.(\d+)\.", name) for name in unused}
            unused = [name for name, block in blocks.items() if block is None or int(block[1]) < layers]
            warnings.warn(
                f"{self.path}: blocks from {layers} on, which predict further tokens, are left out", stacklevel=3
            )
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

    def _float(self, entry: Entry, expert: int | None = None) -> np.ndarray:
        """A tensor's values in float32, as the file has them; of one expert's part if it is given."""
        from gguf import GGMLQuantizationType, dequantize

        shape = entry.shape[0 if expert is None else 1 :]
        if entry.kind in TYPES:
            return self._matrix(entry, expert).decode().view(shape).numpy()
        rows, first = math.prod(shape[:-1]), expert or 0
        data = self._bytes(entry, first * rows, (first + 1) * rows)
        return dequantize(data.reshape(*shape[:-1], -1), GGMLQuantizationType[entry.kind])

    def _bytes(self, entry: Entry, start: int, stop: int) -> np.ndarray:
        """The bytes of a tensor's rows from ``start`` to before ``stop``, ``[rows, bytes of a row]``.

        They are read, not mapped: if the file has been cut short since, that is an error here and a SIGBUS in a map.
        """
        width = entry.nbytes // math.prod(entry.shape[:-1])
        data = np.empty((stop - start, width), np.uint8)
        with open(entry.path, "rb") as file:
            file.seek(entry.offset + start * width)
            if file.readinto(data.data) != data.nbytes:
                raise ValueError(f"{entry.path} ends inside {entry.name}; {DOWNLOAD}")
        return data

    def _floats(self, entries: list[Entry], expert: int | None, shape: tuple[int, ...]) -> Tensor:
        """The parameter in float32 that a tensor, or several, hold; in ``shape`` if only sides of 1 are missing."""
        parts = []
        for entry in entries:
            with one_line(f"{self.path}: {entry.name} of type {entry.kind} cannot be decoded", "use another GGUF type"):
                parts.append(self._layout.process(entry.name, self._float(entry, expert)))
        value = torch.from_numpy(np.ascontiguousarray(self._layout.join(entries[0].name, parts)))
        lies_alike = value.shape[-1:] == shape[-1:] or value.squeeze().shape == torch.Size(s for s in shape if s != 1)
        return value.view(shape) if lies_alike and value.numel() == math.prod(shape) else value

    def _coded(self, entries: list[Entry], expert: int | None, turned: bool) -> CodedMatrix | None:
        """The matrix ``[out, in]`` that a tensor, or several, hold as codes; None if their codes cannot be kept.

        They can if rows only changed places, because a group of codes with one scale lies along a row; and if columns
        did by whole groups. A matrix may have been transposed (GPT-2), or its values changed.

        Args:
            entries: the tensors.
            expert: the number of the expert whose matrix it is, if they have those of all experts.
            turned: whether the parameter is ``[in, out]``.
        """
        kinds, shapes = {entry.kind for entry in entries}, [entry.shape[expert is not None :] for entry in entries]
        if len(kinds) > 1 or not kinds <= TYPES.keys() or any(len(shape) != 2 for shape in shapes):
            return None
        orders = [self._order(entry, shape, turned) for entry, shape in zip(entries, shapes, strict=True)]
        places = [order for order in orders if order is not None]
        if len(places) < len(orders) or len({shape[1] for shape in shapes}) > 1:
            return None
        matrix = stack([self._matrix(entry, expert) for entry in entries])
        columns, rows = places[0].columns, self._layout.join_rows(entries[0].name, [place.rows for place in places])
        matrix = matrix if is_sorted(rows) else matrix.take_rows(rows)
        return matrix if is_sorted(columns) else matrix.take_columns(columns)

    def _order(self, entry: Entry, shape: tuple[int, ...], turned: bool) -> Order | None:
        """The order of a matrix of a tensor, which all experts share."""
        if entry.name not in self._orders:
            self._orders[entry.name] = self._layout.order(entry.name, shape, turned)
        return self._orders[entry.name]

    def _matrix(self, entry: Entry, expert: int | None = None) -> CodedMatrix:
        """The codes and scales of a tensor of one of ``TYPES``, ``[rows, row]``; of an expert's part if it is given."""
        rows = math.prod(entry.shape[expert is not None : -1])
        first = rows * (expert or 0)

        def read(start: int, stop: int) -> Tensor:
            return torch.from_numpy(self._bytes(entry, first + start, first + stop))

        return read_blocks(entry.kind, (rows, entry.shape[-1]), read)


def _check_supported(path: Path, header: Header) -> None:
    """Raises ValueError where the file cannot be used."""
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES or ARCHITECTURES[arch].model_type not in CONFIG_MAPPING:
        raise ValueError(f"{path}: GGUF architecture {arch!r:.100} is not supported; {SAFETENSORS}")
