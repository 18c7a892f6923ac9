"""The common parts of the readers of directories with packed codes.

In such a directory some modules have, in place of ``MODULE.weight``, several tensors: codes, scales, zeros. Which ones
is told by the tensors that are there, because what the settings say of single layers differs from tool to tool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.models.names import check_complete, check_shape

from .coded_matrix import CodedMatrix, Decoded, even_groups
from .safetensors_dir import Entry, SafetensorsDirectory

SCALES = ("F16", "BF16", "F32")  # what scales are stored in
UNQUANTISED = "give the unquantised model"


class Parts:
    """The tensors of one module that is packed."""

    def __init__(self, module: str, entries: dict[str, Entry], tensor: Callable[[str], Tensor]) -> None:
        self.module, self.entries, self._tensor = module, entries, tensor

    def __contains__(self, part: str) -> bool:
        return part in self.entries

    def shape(self, part: str, dimensions: int = 2) -> tuple[int, ...]:
        """The shape of a part that must have so many dimensions."""
        shape = self.entries[part].shape
        if len(shape) != dimensions or not all(shape):
            self.fail(part, f"has shape {shape}, wanted {dimensions} dimensions")
        return shape

    def read(self, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
        """Reads a part. ValueError where it has another shape, or none of the dtypes."""
        entry = self.entries[part]
        if entry.dtype not in dtypes or entry.shape != shape:
            self.fail(part, f"is {entry.dtype} {entry.shape}, wanted {' or '.join(dtypes)} {shape}")
        return self._tensor(f"{self.module}.{part}")

    def bits(self, part: str, count: int, along: int, stated: Sequence[int] = ()) -> int:
        """The width of a code, by the words into which the part packs ``count`` codes along one of its dimensions.

        It is one of those ``stated``, if any are.
        """
        words = self.shape(part)[along]
        for bits in (4, 2, 3, 5, 6, 7, 8):  # a few codes may fit in several ways, of which 4 bits is the usual one
            if -(-count * bits // 32) == words and (not stated or bits in stated):
                return bits
        self.fail(part, f"has {words} words along dimension {along}, which hold {count} codes of no width")

    def groups(
        self, columns: int, count: int, stated_size: Any, scales: str = "scales", index: str = "g_idx"
    ) -> tuple[Tensor, int]:
        """The group of each column, by the part ``index`` if there is one; and the size of a group.

        Args:
            columns: K.
            count: the number of groups.
            stated_size: the group size of the settings, which holds for the layers that it fits.
            scales, index: the names of these parts.
        """
        size = columns if count == 1 else -(-columns // count)
        if type(stated_size) is int and stated_size > 0 and -(-columns // stated_size) == count:
            size = stated_size
        groups = self.read(index, ("I32", "I64"), (columns,)).long() if index in self else None
        if groups is not None and not bool((groups == -1).all()):  # as compressed-tensors marks an absent order
            if not bool(((groups >= 0) & (groups < count)).all()):
                found = f"{int(groups.min())} to {int(groups.max())}"
                self.fail(index, f"has groups from {found}, wanted 0 to {count - 1}")
            return groups, size
        if -(-columns // size) != count:
            self.fail(scales, f"has {count} groups, which {columns} columns do not make")
        return even_groups(columns, size), size

    def fail(self, part: str, problem: str) -> NoReturn:
        raise ValueError(
            f"{self.entries[part].file}: {self.module}.{part} {problem}: the file is damaged, or does not belong to "
            f"its config.json; download it again"
        )


class PackedDirectory(SafetensorsDirectory):
    """The ``Source`` of a directory in which modules have packed codes. A format is a subclass.

    Attributes:
        title: the format's name.
        mark: the part that a module has if, and only if, it is packed.
        required, optional: the names of the other parts.
    """

    title: str
    mark: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.description = f"{self.title} directory {path.resolve().name}"
        self.settings: dict[str, Any] = self.quantization.settings if self.quantization else {}
        self._packed: dict[str, dict[str, Entry]] = {}
        for key in [key for key in self._entries if key.endswith(f".{self.mark}")]:
            module = key.removesuffix(f".{self.mark}")
            self._packed[f"{module}.weight"] = self._parts(module)
        self._parts_of = {
            f"{key.removesuffix('weight')}{part}": key for key, parts in self._packed.items() for part in parts
        }
        for key, parts in self._packed.items():
            if key in self._entries and "weight" not in parts:
                raise ValueError(f"{path} has both {key} and {key.removesuffix('weight')}{self.mark}; {UNQUANTISED}")
            self._entries.setdefault(key, parts[self.mark])
        self._check_settings()

    def _parts(self, module: str) -> dict[str, Entry]:
        wanted = [f"{module}.{part}" for part in (self.mark, *self.required)]
        check_complete(str(self.path), wanted, self._entries)
        names = (self.mark, *self.required, *self.optional)
        return {part: self._entries[f"{module}.{part}"] for part in names if f"{module}.{part}" in self._entries}

    def _check_settings(self) -> None:
        """Raises ValueError where the settings are of a variant that the reader does not read."""

    def _matrix(self, parts: Parts, rows: int, columns: int) -> CodedMatrix | Decoded:
        """Reads the matrix of one module, ``[rows, columns]``."""
        raise NotImplementedError

    def _check_stated_shape(self, parts: Parts, part: str, shape: tuple[int, int]) -> None:
        """Compares the shape that a part states, if it is there, with that of the module's matrix."""
        if part in parts:
            stated = parts.read(part, ("I64", "I32"), (2,)).tolist()
            check_shape(str(self.path), parts.module, stated, shape)

    def refuse(self, what: str, remedy: str = UNQUANTISED) -> NoReturn:
        """Raises the ValueError of a variant that cannot be read."""
        where = self.quantization.where if self.quantization else "config.json"
        raise ValueError(f"{self.path}: {where} has {what}, which is not supported: {remedy}")

    def value(self, name: str, key: str, shape: tuple[int, ...]) -> Tensor | Int4Weight:
        if key not in self._packed:
            return super().value(name, key, shape)
        rows, columns = shape
        matrix = self._matrix(Parts(key.removesuffix(".weight"), self._packed[key], self._tensor), rows, columns)
        weight = matrix.to_int4() if isinstance(matrix, CodedMatrix) else None
        if weight is not None:
            return weight
        decoded = matrix.decoded() if isinstance(matrix, CodedMatrix) else matrix
        self.decoded[name] = decoded.codes
        return decoded.weight

    def _usable(self, key: str) -> bool:
        return key in self._packed or super()._usable(key)

    def _belongs(self, key: str, used: set[str]) -> bool:
        if key in used or self._parts_of.get(key) in used:
            return True
        # Some tools write a bias of zeros for every module.
        module, _, last = key.rpartition(".")
        is_bias = last == "bias" and f"{module}.weight" in self._packed
        return is_bias and not bool(self._tensor(key).count_nonzero())

    def _are_equal(self, key: str, other: str) -> bool:
        if key not in self._packed or other not in self._packed:
            return super()._are_equal(key, other)
        ways = [{f"{way.removesuffix('weight')}{part}" for part in self._packed[way]} for way in (key, other)]
        return len(ways[0]) == len(ways[1]) and all(
            torch.equal(self._tensor(one), self._tensor(two))
            for one, two in zip(sorted(ways[0]), sorted(ways[1]), strict=True)
        )
