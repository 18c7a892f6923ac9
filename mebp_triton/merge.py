"""A store with its adapter -> a model directory in 16 or 32 bits, or a store again.

A merged weight is ``W + scaling·B·A``, computed in float32 and rounded once. Some rows of one matrix are in memory at
a time; of a store, a block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import files
from .adapter import PREFIX, adapter_shapes, check_fit, read_adapter_config, read_adapter_tensors
from .convert import QuantizeReport, Recipe, write_store
from .importers import (
    check_complete,
    check_shape,
    check_sizes,
    parameter_aliases,
    persistent_buffers,
    prepare_config,
    read_config,
)
from .importers.safetensors_dir import INDEX, SINGLE, write_companions
from .kernels.layout import Int4Weight, Scheme
from .kernels.reference import decode
from .model import check_matrices
from .skeleton import Int4Site, build_skeleton, int4_sites
from .stores.format import Store, dtype_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PIECE_ELEMENTS = 1 << 20  # decoding takes up to 24 bytes for each
SHARD_BYTES = 4 << 30


class MergedStore:
    """The ``Source`` that a store and an adapter make together.

    Args:
        store: a directory made by ``quantize``.
        adapter: a directory in PEFT's format; None for the store's own weights.

    Raises:
        ValueError: one of them is damaged, or (in ``bind``) they do not fit each other.
    """

    def __init__(self, store: Path | str, adapter: Path | str | None = None) -> None:
        self.store = Store(store)
        self.adapter = adapter
        self.directory = self.store.directory
        self._config_json = files.read_json(self.directory / "config.json")
        self.config = prepare_config(read_config(self.directory, "quantize the model again"), str(self.directory))
        check_sizes(f"store {self.directory}", self.config, self.store.shapes())
        self.description = self.store.source
        self._lora = None if adapter is None else read_adapter_config(adapter)
        self._tensors = {} if adapter is None else read_adapter_tensors(adapter)
        if adapter is not None:
            self.description += f", merged with adapter {Path(adapter).resolve().name}"
        self._sites: dict[str, Int4Site] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, model: PreTrainedModel) -> None:
        sites, tied = int4_sites(model)
        check_matrices(self.store, sites, tied)
        self._sites = {f"{site.name}.weight": site for site in sites}
        check_complete(f"store {self.directory}", parameter_aliases(model), [*self._sites, *self.store.floats])
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in self.store.floats:
            if name in self._shapes:
                check_shape(f"store {self.directory}", name, self.store.float_shape(name), self._shapes[name])
        if self._lora is not None:
            linear = {site.name: (site.out_features, site.in_features) for site in sites if site.role == "linear"}
            check_fit(adapter_shapes(self._lora, linear), self._tensors, str(self.adapter))

    def has(self, name: str) -> bool:
        return name in self._sites or name in self.store.floats

    def dtype(self, name: str) -> torch.dtype | None:
        """Of a parameter that is stored as a float; None of a matrix."""
        return None if name in self._sites else self.store.files[self.store.floats[name]].entries[name][0]

    def read(self, name: str) -> Tensor | Int4Weight:
        """As it is stored, where no adapter changes it."""
        if name not in self._sites:
            return self.store.float_tensor(name)
        site = self._sites[name]
        if self._delta(site) is None:
            self._verify(site)
            return self.store.weight(site.name)
        merged = torch.empty(site.out_features, site.in_features)
        done = 0
        for piece in self._rows(site):
            merged[done : done + len(piece)] = piece
            done += len(piece)
        return merged.t() if site.transposed else merged

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The parameter from its first row to its last; a matrix in float32."""
        site = self._sites.get(name)
        if site is None:
            yield self.store.float_tensor(name)
        elif site.transposed:
            yield torch.cat(list(self._rows(site))).t()
        else:
            yield from self._rows(site)

    def save_companions(self, directory: str | os.PathLike[str]) -> None:
        write_companions(self._config_json, self.directory, Path(directory))

    def save_as(self, dtype: str, directory: Path) -> None:
        """``save_companions`` with another dtype in the config."""
        config = {key: value for key, value in self._config_json.items() if key != "torch_dtype"}
        write_companions(config | {"dtype": dtype}, self.directory, directory)

    def _delta(self, site: Int4Site) -> tuple[Tensor, Tensor, float] | None:
        """A, B in float32 and the scaling, where the adapter changes the matrix."""
        names = [f"{PREFIX}{site.name}.lora_{part}.weight" for part in "AB"]
        if self._lora is None or names[0] not in self._tensors:
            return None
        a, b = (self._tensors[name].float() for name in names)
        return a, b, self._lora.scaling(site.name)

    def _verify(self, site: Int4Site) -> None:
        self.store.files[self.store.matrices[site.name].file].verify()

    def _rows(self, site: Int4Site) -> Iterator[Tensor]:
        """``[rows, in]`` float32, some rows of ``[out, in]`` at a time."""
        self._verify(site)
        weight, mapped = self.store.weight(site.name), self.store.files[self.store.matrices[site.name].file].mapped
        step = max(1, PIECE_ELEMENTS // site.in_features)
        delta = self._delta(site)
        for start in range(0, site.out_features, step):
            stop = min(start + step, site.out_features)
            rows = decode(weight.rows(start, stop), torch.float32)
            if delta is not None:
                a, b, scaling = delta
                rows.addmm_(b[start:stop], a, alpha=scaling)
            yield rows
        mapped.drop()


def merge(
    store: Path | str,
    target: Path | str,
    adapter: Path | str | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Makes a transformers model directory of a store, with its adapter merged in.

    Args:
        store: a directory made by ``quantize``.
        target: must not exist, or be empty. It appears whole or not at all.
        adapter: in PEFT's format. Without one the weights are the store's, decoded and rounded once to ``dtype``.
        dtype: "float32", "bfloat16" or "float16"; by default the config's.
        progress: called with (tensors done, tensors in all).

    Returns:
        The dtype.

    Raises:
        ValueError: the adapter does not fit the store, one of them is damaged, or a weight is too large for float16;
            nothing is left behind.
    """
    files.check_absent(Path(target))
    source = MergedStore(store, adapter)
    if dtype is None:
        named = str(source.config.get_text_config().dtype).removeprefix("torch.")
        dtype = named if named in DTYPES else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    model = build_skeleton(source.config, torch.float32)
    source.bind(model)
    tensors = dict(model.named_parameters()) | {
        name: model.get_buffer(name) for name in persistent_buffers(model) if source.has(name)
    }
    wide = DTYPES[dtype]
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, tensor in tensors.items():
        kept = source.dtype(name)
        saved = wide if kept is None or kept.is_floating_point else kept
        entries[name] = dtype_name(saved), tuple(tensor.shape), prod(tensor.shape) * saved.itemsize
    shards = _shards(entries)
    done = 0

    def pieces(names: list[str]) -> Iterator[Tensor]:
        nonlocal done
        for name in names:
            for piece in source.pieces(name):
                yield _rounded(piece, wide, name).contiguous()
            done += 1
            progress(done, len(entries))

    with files.atomic_directory(Path(target)) as directory:
        source.save_as(dtype, directory)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(shards):
            file = SINGLE if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            files.write_safetensors_pieces(directory / file, {name: entries[name] for name in names}, pieces(names))
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            size = sum(entry[2] for entry in entries.values())
            files.write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return dtype


def merge_to_store(
    store: Path | str,
    target: Path | str,
    adapter: Path | str | None = None,
    scheme: Scheme | None = None,
    group_size: int | None = None,
    scale_search: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizeReport:
    """Makes a store of a store, with its adapter merged in.

    Matrices that the adapter changes are quantized anew, each in its own scheme and group size unless others are asked
    for. The rest is taken over bit for bit.

    Args:
        store, target, adapter: see ``merge``.
        scheme, group_size, scale_search: see ``quantize``.
        progress: called with (matrices done, matrices in all).

    Raises:
        ValueError: as ``merge``; nothing is left behind.
    """
    recipe = Recipe(scheme, group_size, scale_search)
    files.check_absent(Path(target))
    source = MergedStore(store, adapter)

    def form_of(name: str) -> tuple[Scheme, int]:
        weight = source.store.weight(name)
        return weight.scheme, weight.group_size

    return write_store(source, Path(target), recipe, None, form_of, progress)


def _shards(entries: dict[str, tuple[str, tuple[int, ...], int]]) -> list[list[str]]:
    """Names by file, which is at most ``SHARD_BYTES`` long unless one tensor is longer; wider dtypes first."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, (_, _, nbytes) in entries.items():
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return [sorted(names, key=lambda name: -entries[name][2] // max(1, prod(entries[name][1]))) for names in shards]


def _rounded(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not piece.is_floating_point():
        return piece
    rounded = piece.to(dtype)
    if not rounded.isfinite().all():
        why = "is too large for float16: merge into bfloat16" if piece.isfinite().all() else "is not finite"
        raise ValueError(f"{name} {why}")
    return rounded
