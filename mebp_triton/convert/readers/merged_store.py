"""Reads a store and its adapter as one checkpoint of merged weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mebp_triton.convert.companions import write_companions
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.models.adapter import (
    CHAT_TEMPLATE,
    PREFIX,
    adapter_shapes,
    check_fit,
    expert_adapters,
    read_adapter_config,
)
from mebp_triton.models.adapter_seal import read_adapter_tensors
from mebp_triton.models.build import check_matrices
from mebp_triton.models.config import prepare_config, read_store_config
from mebp_triton.models.experts import fused_experts
from mebp_triton.models.generation import saved_stops, write_stops
from mebp_triton.models.names import check_complete, check_shape, names_in, parameter_aliases, tensor_shapes
from mebp_triton.models.skeleton import Int4Site, int4_sites
from mebp_triton.store.reader import Store, StoreFile, open_store
from mebp_triton.system import strict_json

PIECE_ELEMENTS = 1 << 20  # decoding takes up to 24 bytes for each element of a piece


class Delta(NamedTuple):
    """The update of a matrix by an adapter: ``scaling * b @ a``, with a ``[r, in]`` and b ``[out, r]`` in float32."""

    a: Tensor
    b: Tensor
    scaling: float


class MergedStore:
    """The ``Source`` that a store and an adapter make together.

    Args:
        store: a directory made by ``quantize``, or the store that was opened there.
        adapter: a directory in PEFT's format; None for the store's own weights.
        piece_elements: how many elements are decoded at a time, except in a matrix that has to be transposed.

    Raises:
        ValueError: one of them is damaged, or (in ``bind``) they do not fit each other.
    """

    def __init__(
        self, store: Store | Path | str, adapter: Path | str | None = None, piece_elements: int = PIECE_ELEMENTS
    ) -> None:
        self.store = open_store(store)
        self.adapter, self.piece_elements = adapter, piece_elements
        self.directory = self.store.directory
        self._config_json = strict_json.read_json(self.directory / "config.json")
        self.config = prepare_config(read_store_config(self.store), str(self.directory))
        self.description = self.store.source
        self.files = [file.path for file in self.store.files.values()]
        self.decoded: dict[str, str] = {}
        self._lora = None if adapter is None else read_adapter_config(adapter)
        self._tensors = {} if adapter is None else read_adapter_tensors(adapter)
        self.stops = [] if adapter is None else saved_stops(adapter)
        if adapter is not None:
            self.description += f", merged with adapter {Path(adapter).resolve().name}"
        self.sites: dict[str, Int4Site] = {}
        self._experts: dict[str, list[Int4Site]] = {}  # single experts, by the parameter that has all of them
        self._names: dict[str, str] = {}  # the names that the store has parameters by
        self._nested: dict[str, str] = {}  # the paths at which PEFT has the adapters of such parameters
        self._shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, model: PreTrainedModel) -> None:
        sites, tied = int4_sites(model, self.store)
        check_matrices(self.store, sites, tied)
        self.sites = {f"{site.name}.weight": site for site in sites}
        self._experts = {}
        for site in sites:
            if site.role == "expert":
                self._experts.setdefault(site.parameter, []).append(site)
        self._names = names_in(model, {*(site.parameter for site in sites), *self.store.floats})
        check_complete(f"store {self.directory}", parameter_aliases(model), self._names)
        self._shapes = tensor_shapes(model)
        for name in self.store.floats:
            if name in self._shapes:
                check_shape(f"store {self.directory}", name, self.store.float_shape(name), self._shapes[name])
        if self._lora is not None:
            linear = {site.name: (site.out_features, site.in_features) for site in sites if site.role == "linear"}
            parameters = {parameter.rpartition(".")[0] for parameter in self._experts}
            experts = [one for one in fused_experts(model) if one.path in parameters]
            self._nested = {name: path for name, (path, _) in expert_adapters(self._lora, experts).items()}
            check_fit(adapter_shapes(self._lora, linear, experts), self._tensors, str(self.adapter))
            self._check_shared(model)

    def _check_shared(self, model: PreTrainedModel) -> None:
        """Raises ValueError where the adapter would change a matrix that layers share, for one of them alone."""
        for names in parameter_aliases(model).values():
            sites = [self.sites[name] for name in names if name in self.sites]
            changed = [site.name for site in sites if self.delta(site) is not None]
            if len(sites) > 1 and changed:
                other = next(site.name for site in sites if site.name != changed[0])
                raise ValueError(
                    f"{changed[0]} and {other} share one weight and have an adapter each: no model directory or store "
                    f"can have both; use the adapter by PEFT, unmerged"
                )

    def has(self, name: str) -> bool:
        return name in self.sites or name in self._names or name in self.store.floats

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype in which the store has a float tensor; None for a matrix, and for those of all experts."""
        name = self._names.get(name, name)
        is_int4 = name in self.sites or name in self._experts
        return None if is_int4 else self.store.files[self.store.floats[name]].entries[name][0]

    def read(self, name: str) -> Tensor | Int4Weight:
        """One parameter: as it is stored, unless the adapter changes it."""
        name = self._names.get(name, name)
        if name in self._experts:
            return torch.cat(list(self.pieces(name))).view(self._shapes[name])
        if name not in self.sites:
            return self.store.float_tensor(name)
        site = self.sites[name]
        if self.delta(site) is None:
            self._file(site)
            return self.store.weight(site.name)
        merged = torch.empty(site.out_features, site.in_features)
        done = 0
        for piece in self.rows(site):
            merged[done : done + len(piece)] = piece
            done += len(piece)
        return merged.t() if site.transposed else merged

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The rows of a parameter in order, some at a time; those of a matrix are in float32."""
        name = self._names.get(name, name)
        sites = [self.sites[name]] if name in self.sites else self._experts.get(name)
        if sites is None:
            yield self.store.float_tensor(name)
            return
        for site in sites:
            if site.transposed:
                yield torch.cat(list(self.rows(site))).t()
            else:
                yield from self.rows(site)

    def save_companions(self, directory: str | os.PathLike[str]) -> None:
        self._write_companions(self._config_json, Path(directory))

    def save_as(self, dtype: str, directory: Path) -> None:
        """Writes the companions as ``save_companions`` does, with another dtype in the config."""
        config = {key: value for key, value in self._config_json.items() if key != "torch_dtype"}
        self._write_companions(config | {"dtype": dtype}, directory)

    def _write_companions(self, config: dict[str, Any], directory: Path) -> None:
        """Copies the store's companions; where the adapter's model stops, and its chat template, go before theirs."""
        write_companions(config, self.directory, directory)
        if self.stops:
            write_stops(directory, self.directory, self.stops)
        own = None if self.adapter is None else Path(self.adapter) / CHAT_TEMPLATE
        if own is not None and own.is_file():
            shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
            shutil.copyfile(own, directory / CHAT_TEMPLATE)

    def delta(self, site: Int4Site) -> Delta | None:
        """What the adapter adds to a matrix; None where that is nothing."""
        path = self._nested.get(site.parameter) if site.role == "expert" else site.name
        names = [f"{PREFIX}{path}.lora_{part}.weight" for part in "AB"]
        if self._lora is None or names[0] not in self._tensors:
            return None
        a, b = (self._tensors[name].float() for name in names)
        if site.role != "expert":
            return Delta(a, b, self._lora.scaling(site.name))
        expert, count = int(site.name.split(".")[-2]), len(self._experts[site.parameter])
        own_a, own_b = a.unflatten(0, (count, -1))[expert], b.unflatten(1, (-1, count))[..., expert]
        return Delta(own_a, own_b, self._lora.scaling(site.parameter))

    def experts_in(self, parameter: str) -> list[Int4Site]:
        """The matrices of the experts that lie in a parameter; none where it has none."""
        return self._experts.get(parameter, [])

    def _file(self, site: Int4Site) -> StoreFile:
        """The file that has the matrix, with its checksums compared."""
        file = self.store.files[self.store.matrices[site.name].file]
        file.verify()
        return file

    def rows(self, site: Int4Site, order: Tensor | None = None) -> Iterator[Tensor]:
        """The merged matrix ``[out, in]`` in float32, some rows at a time; those of ``order``, if there is one."""
        file, weight = self._file(site), self.store.weight(site.name)
        step = max(1, self.piece_elements // site.in_features)
        delta, count = self.delta(site), site.out_features if order is None else len(order)
        for start in range(0, count, step):
            stop = min(start + step, count)
            part = weight.rows(start, stop) if order is None else weight.gather(order[start:stop])
            rows = decode(part, torch.float32)
            if delta is not None:
                b = delta.b[start:stop] if order is None else delta.b[order[start:stop]]
                rows.addmm_(b, delta.a, alpha=delta.scaling)
            yield rows
        file.mapped.drop()
