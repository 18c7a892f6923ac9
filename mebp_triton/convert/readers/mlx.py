"""Reads MLX directories: codes are kept as they are, in affine groups and in MXFP4.

``weight`` uint32 ``[N, K * bits / 32]`` has its codes along K, from the lowest bits up; wide ones cross words. Affine
layers have ``scales`` and ``biases`` ``[N, groups]``, and a weight is ``code * scale + bias``. MXFP4 has only
``scales``, uint8, which are exponents of 2 with a bias of 127. Embedding and head are packed as well. Single layers may
have other widths and groups, which their shapes tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .coded_matrix import E2M1, CodedMatrix, even_groups, powers_of_two, unpack_bits
from .gptq import native_form_of
from .packed_dir import SCALES, PackedDirectory, Parts
from .quantization import MLX
from .source import NativeForm

MODES = ("affine", "mxfp4")


class MlxDirectory(PackedDirectory):
    """The ``Source`` of such a directory."""

    quant_method = MLX
    title = "MLX"
    mark = "scales"
    required = ("weight",)
    optional = ("biases",)

    @staticmethod
    def native_form(settings: dict[str, Any]) -> NativeForm | None:
        if settings.get("mode", "affine") == "mxfp4":
            return NativeForm("codebook", 32, torch.float16, tables=True)
        form = native_form_of(settings, symmetric=False)
        return None if form is None else form._replace(scale_dtype=torch.float16, tables=True)

    def _check_settings(self) -> None:
        layers = [settings for settings in self.settings.values() if isinstance(settings, dict)]
        for settings in (self.settings, *layers):
            if (mode := settings.get("mode", MODES[0])) not in MODES:
                self.refuse(f"mode {mode!r:.100}")

    def _matrix(self, parts: Parts, rows: int, columns: int) -> CodedMatrix:
        bits = parts.bits("weight", columns, along=1)
        words = parts.read("weight", ("U32",), (rows, -(-columns * bits // 32)))

        def codes(start: int, stop: int) -> Tensor:
            return unpack_bits(words[start:stop], bits)[:, :columns]

        count = parts.shape("scales")[1]
        if columns % count:
            parts.fail("scales", f"has {count} groups, into which {columns} columns do not fall")
        groups, size = even_groups(columns, columns // count), columns // count
        if "biases" in parts:
            scales, biases = (parts.read(part, SCALES, (rows, count)).t() for part in ("scales", "biases"))
            return CodedMatrix(codes, bits, scales, groups, size, minimum=biases)
        exponents = parts.read("scales", ("U8",), (rows, count))
        if (bits, size) != (4, 32):
            parts.fail(
                "scales", f"is for codes of {bits} bits in groups of {size}, and MXFP4 has 4 bits in groups of 32"
            )
        return CodedMatrix(codes, 4, powers_of_two(exponents).t(), groups, size, levels=E2M1)
