"""Reads directories whose experts are in MXFP4, as OpenAI's gpt-oss; an expert's codes are taken as they are.

The parameter ``P`` of all experts is stored as ``P_blocks`` ``[experts, out, in / 32, 16]`` uint8, the lower four bits
of a byte first, and ``P_scales`` ``[experts, out, in / 32]`` uint8, powers of two. All else is float.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.models.names import check_complete, check_shape

from .coded_matrix import E2M1, CodedMatrix, even_groups, powers_of_two, unpack_bits
from .safetensors_dir import SafetensorsDirectory
from .source import NativeForm

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32


class Mxfp4Directory(SafetensorsDirectory):
    """The ``Source`` of such a directory."""

    quant_method = "mxfp4"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.description = f"MXFP4 directory {path.resolve().name}"
        self._packed = {key.removesuffix(BLOCKS) for key in self._entries if key.endswith(BLOCKS)}
        check_complete(str(path), (f"{key}{SCALES}" for key in self._packed), self._entries)
        for key in self._packed:
            self._entries.setdefault(key, self._entries[f"{key}{BLOCKS}"])

    @staticmethod
    def native_form(settings: dict[str, Any]) -> NativeForm | None:
        return NativeForm("codebook", GROUP, torch.float16, experts_alone=True)

    def _usable(self, key: str) -> bool:
        return key in self._packed or super()._usable(key)

    def _belongs(self, key: str, used: set[str]) -> bool:
        return key in used or any(key.removesuffix(part) in used & self._packed for part in (BLOCKS, SCALES))

    def value(self, name: str, key: str, shape: tuple[int, ...]) -> Tensor | Int4Weight:
        if key in self._packed:
            raise ValueError(f"{self.path}: {key} has experts in MXFP4, which need transformers 5 or later")
        return super().value(name, key, shape)

    def expert_value(self, key: str, expert: int) -> Tensor | Int4Weight:
        if key not in self._packed:
            return super().expert_value(key, expert)
        blocks, exponents = (
            self.expert_slice(f"{key}{BLOCKS}", expert)[0],
            self.expert_slice(f"{key}{SCALES}", expert)[0],
        )
        where = f"{self._entries[key].file}: {key}"
        if blocks.dtype != torch.uint8 or exponents.dtype != torch.uint8:
            raise ValueError(f"{where} has {blocks.dtype} and {exponents.dtype} in place of bytes: download it again")
        check_shape(where, "an expert's blocks", blocks.shape, (*exponents.shape, GROUP // 2))
        columns = blocks.shape[1] * GROUP
        codes = unpack_bits(blocks.flatten(1), 4)
        matrix = CodedMatrix(codes, 4, powers_of_two(exponents).t(), even_groups(columns, GROUP), GROUP, levels=E2M1)
        weight = matrix.to_int4()
        assert weight is not None  # our layout has groups of 32
        return weight
