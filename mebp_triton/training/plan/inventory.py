"""The tensors of a store, whether it exists or would be made, and a stand-in for it that has shapes and no bytes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from mebp_triton.blocks.runner import find_blocks
from mebp_triton.convert.readers import NativeForm, is_quantized, native_form
from mebp_triton.convert.recipe import DECODED_FORM, TABLE_FORM, Recipe, scale_dtype_of
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import DEFAULT_FORM
from mebp_triton.models.skeleton import Int4Site, build_skeleton, float_names, int4_sites
from mebp_triton.store.manifest import SHARED, MatrixInfo, block_file, dtype_name
from mebp_triton.store.reader import Store

Shape = tuple[torch.dtype, tuple[int, ...]]


def nbytes(shape: Shape) -> int:
    return shape[0].itemsize * prod(shape[1])


@dataclass(frozen=True)
class Inventory:
    """The tensors of a store, whether it exists or would be made.

    Attributes:
        files: for every file, the dtypes and shapes of its tensors by name.
        sizes: the bytes of every file.
        matrices, floats, tied_head: as in ``Store``.
    """

    files: dict[str, dict[str, Shape]]
    sizes: dict[str, int]
    matrices: dict[str, MatrixInfo]
    floats: dict[str, str]
    tied_head: bool

    @classmethod
    def of_store(cls, store: Store) -> Inventory:
        files = {
            name: {tensor: (entry[0], entry[1]) for tensor, entry in file.entries.items()}
            for name, file in store.files.items()
        }
        sizes = {name: file.mapped.size for name, file in store.files.items()}
        return cls(files, sizes, store.matrices, store.floats, store.tied_head)

    @classmethod
    def of_config(cls, config: Any, **asked: Any) -> Inventory:
        """The inventory of the store that ``quantize`` would make of a model with this config.

        ``asked``: the arguments that ``quantize`` would get, of those that ``convert.recipe.Recipe`` has.
        """
        native = native_form(config)
        recipe = Recipe(**asked)
        default = DECODED_FORM if is_quantized(config) and not (native and native.experts_alone) else DEFAULT_FORM
        model = build_skeleton(copy.deepcopy(config), torch.float32)
        path, stack = find_blocks(model)
        sites, tied = int4_sites(model)
        files: dict[str, dict[str, Shape]] = {name: {} for name in (*map(block_file, range(len(stack))), SHARED)}
        matrices, floats = {}, {}

        def file_of(name: str) -> str:
            inside = name.startswith(path + ".")
            return block_file(int(name.removeprefix(path + ".").split(".")[0])) if inside else SHARED

        for site in sites:
            shape, file = (site.out_features, site.in_features), file_of(site.name)
            own = _native_of(native, site)
            form = own.form if own else TABLE_FORM if site.is_table else default
            taken_over = own is not None and recipe.takes(form, site.role)
            scheme, group_size, bits = form = recipe.form(form, site.role)
            scale_name = dtype_name(own.scale_dtype if own and taken_over else scale_dtype_of(form))
            info = matrices[site.name] = MatrixInfo(file, scheme, shape, group_size, scale_name, 0.0, bits)
            files[file] |= {f"{site.name}.{part}": tensor for part, tensor in info.tensors().items()}
        dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
        for name in float_names(model, sites):
            floats[name] = file_of(name)
            files[floats[name]][name] = dtype, tuple(model.get_parameter(name).shape)
        sizes = {name: sum(map(nbytes, tensors.values())) for name, tensors in files.items()}
        return cls(files, sizes, matrices, floats, tied)

    def part(self, dropped: set[str]) -> Inventory:
        """The inventory without the matrices and floats of the files ``dropped``."""
        matrices = {name: info for name, info in self.matrices.items() if info.file not in dropped}
        floats = {name: file for name, file in self.floats.items() if file not in dropped}
        return dataclasses.replace(self, matrices=matrices, floats=floats)


def _native_of(native: NativeForm | None, site: Int4Site) -> NativeForm | None:
    """The form of the codes that a matrix has in the source; None where it is of floats there."""
    if native is None or (site.is_table and not native.tables) or (native.experts_alone and site.role != "expert"):
        return None
    return native


class ShapesOnly:
    """Stands for a ``Store`` while a model is traced: its tensors have the right shapes and no bytes."""

    def __init__(self, inventory: Inventory, directory: str) -> None:
        self.inventory, self.directory = inventory, directory
        self.matrices, self.floats, self.tied_head = inventory.matrices, inventory.floats, inventory.tied_head
        self.files = {name: _NoFile(name, inventory.matrices) for name in inventory.files}

    def weight(self, name: str, source: Any = None) -> Int4Weight:
        info = self.matrices[name]
        parts = {part: torch.empty(shape, dtype=dtype) for part, (dtype, shape) in info.tensors().items()}
        return Int4Weight(in_features=info.shape[1], group_size=info.group_size, **parts)

    def float_tensor(self, name: str) -> Tensor:
        dtype, shape = self.inventory.files[self.floats[name]][name]
        return torch.empty(shape, dtype=dtype)


class _NoFile:
    """Stands for a ``StoreFile`` and its mapping, from which nothing is read."""

    start = 0

    def __init__(self, name: str, matrices: Mapping[str, MatrixInfo]) -> None:
        self.entries = {f"{matrix}.packed": (torch.uint8, (), 0, 0) for matrix in matrices}
        self.mapped = self

    def verify(self) -> None:
        pass

    def populate(self, start: int = 0, stop: int = 0) -> None:
        pass

    read_ahead = drop = populate
