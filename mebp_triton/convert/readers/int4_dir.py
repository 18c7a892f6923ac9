"""Reads directories that ``save_pretrained`` wrote for a model with int4 layers; their codes are taken as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton.huggingface.int4_config import METHOD, Int4Config
from mebp_triton.kernels.group_fit import NF4
from mebp_triton.kernels.layout import Int4Weight, packed_columns
from mebp_triton.models.names import check_complete
from mebp_triton.system import strict_json

from .safetensors_dir import SafetensorsDirectory
from .source import NativeForm

SCALE_DTYPES = {2: torch.float16, 4: torch.float32}  # by the bytes of an element


class Int4Directory(SafetensorsDirectory):
    """The ``Source`` of such a directory. Its float tensors are read as those of any other model."""

    quant_method = METHOD

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._int4 = Int4Config(**(self.quantization.settings if self.quantization else {}))
        except strict_json.MALFORMED as error:
            raise ValueError(f"{path / 'config.json'}: quantization_config: {error}") from None
        self.description = f"int4 directory {path.resolve().name}"

    @staticmethod
    def native_form(settings: dict[str, Any]) -> NativeForm | None:
        try:
            config = Int4Config(**settings)
        except strict_json.MALFORMED:  # which opening the directory reports
            return None
        return NativeForm(config.scheme, config.group_size, torch.float16, config.bits)

    def _usable(self, key: str) -> bool:
        if not self._is_int4(key):
            return super()._usable(key)
        check_complete(str(self.path), self._scale_keys(key), self._entries)
        return True

    def _belongs(self, key: str, used: set[str]) -> bool:
        owner = key.rpartition(".")[0] + ".weight"
        return key in used or (owner in used and self._is_int4(owner) and key in self._scale_keys(owner))

    def _is_int4(self, key: str) -> bool:
        return self._entries[key].dtype == "U8" and key.endswith(".weight")

    def _scale_keys(self, key: str) -> list[str]:
        names = ["scales", "minimum"] if self._int4.scheme == "affine" else ["scales"]
        return [key.removesuffix("weight") + name for name in names]

    def value(self, name: str, key: str, shape: tuple[int, ...]) -> Tensor | Int4Weight:
        if not self._is_int4(key):
            return super().value(name, key, shape)
        rows, columns = shape
        packed, scales = self._tensor(key), [self._scales(scale_key, rows) for scale_key in self._scale_keys(key)]
        codebook = NF4.clone() if self._int4.scheme == "codebook" else None
        try:
            if packed.shape[-1] != packed_columns(columns, self._int4.bits):
                raise ValueError(f"{tuple(packed.shape)} is no shape of {columns} codes of {self._int4.bits} bits")
            return Int4Weight(packed, scales[0], columns, self._int4.group_size, *scales[1:], codebook=codebook)
        except ValueError as error:
            raise ValueError(f"{self._entries[key].file}: {key}: {error}") from None

    def _scales(self, key: str, rows: int) -> Tensor:
        """Scales ``[groups, rows]`` from their bytes ``[groups, rows * itemsize]``, whose width tells the dtype."""
        entry = self._entries[key]
        width = entry.shape[1] / rows if entry.dtype == "U8" and len(entry.shape) == 2 else 0
        if width not in SCALE_DTYPES:
            raise ValueError(f"{entry.file}: {key} is {entry.dtype} {entry.shape}, wanted the scales of {rows} rows")
        return self._tensor(key).clone().view(SCALE_DTYPES[int(width)])
