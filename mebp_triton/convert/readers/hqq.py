"""Reads HQQ's safetensors files: codes in groups along rows (axis 1) are kept as they are.

A weight is ``(code - zero) * scale``, and zeros have fractions. The matrix is cut into runs of G weights, which are the
rows of a matrix of codes (axis 1) or its columns (axis 0). ``W_q`` has that matrix with several of its rows in a byte,
the first of them in the highest bits: with 4 bits its upper half in high nibbles, and its lower half in low nibbles.
``scale`` and ``zero`` are ``[runs, 1]`` or ``[1, runs]``. HQQ's own settings lie beside them in tensors.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.bitsandbytes import common_group_size

from .coded_matrix import CodedMatrix, Decoded, even_groups
from .gptq import native_form_of
from .packed_dir import SCALES, PackedDirectory, Parts
from .source import NativeForm

# HQQ's own settings, of which none is needed.
SETTINGS = (
    *("axis", "channel_wise", "compute_dtype", "encoded_state_dict", "group_size", "nbits", "offload_meta"),
    *("optimize", "packing", "quant_scale", "quant_zero", "round_zero", "stores_quant_config"),
    *("unpack_view_dtype", "view_as_float"),
)


class HqqDirectory(PackedDirectory):
    """The ``Source`` of such a directory."""

    quant_method = "hqq"
    title = "HQQ"
    mark = "W_q"
    required = ("scale", "zero")
    optional = ("shape", *SETTINGS)

    @staticmethod
    def native_form(settings: dict[str, Any]) -> NativeForm | None:
        stated = settings.get("quant_config")
        stated = stated.get("weight_quant_params", stated) if isinstance(stated, dict) else {}
        if not isinstance(stated, dict) or stated.get("axis") == 0:
            return None
        return native_form_of({"bits": stated.get("nbits", 4), "group_size": stated.get("group_size", 64)}, False)

    def _matrix(self, parts: Parts, rows: int, columns: int) -> CodedMatrix | Decoded:
        self._check_stated_shape(parts, "shape", (rows, columns))
        packed = parts.shape("W_q")
        if (dtype := parts.entries["W_q"].dtype) != "U8":
            self.refuse(f"{parts.module}.W_q as {dtype} (as 3 bits and view_as_float are stored), wanted U8")
        bits = next((bits for bits in (8, 4, 2, 1) if prod(packed) * 8 == rows * columns * bits), None)
        if bits is None:
            parts.fail("W_q", f"has shape {packed}, which holds no {rows} x {columns} codes of 1, 2, 4 or 8 bits")
        codes = _unpack(parts.read("W_q", ("U8",), packed), bits)
        scale_shape = parts.shape("scale")
        by_rows, runs = scale_shape == (len(codes), 1), max(scale_shape)
        if not by_rows and scale_shape != (1, codes.shape[1]):
            parts.fail("scale", f"has shape {scale_shape}, wanted one for each row or column of {tuple(codes.shape)}")
        scales, zeros = (parts.read(part, SCALES, scale_shape).float() for part in ("scale", "zero"))
        size = rows * columns // runs
        ours = common_group_size(columns, size) or (size if columns % size == 0 else None)
        if not by_rows or ours is None:
            what = f"codes in groups of {size} that go over several rows"
            return Decoded(((codes - zeros) * scales).view(rows, columns), f"{what}, as HQQ's axis=0 makes them")
        run_of_group = torch.arange(0, rows * columns, ours) // size
        scales, zeros = (numbers.flatten()[run_of_group].view(rows, -1).t() for numbers in (scales, zeros))
        matrix = CodedMatrix(codes.view(rows, columns), bits, scales, even_groups(columns, ours), ours)
        return matrix.with_zeros(zeros)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """All rows of codes, uint8: those in the highest bits of the bytes come first."""
    mask = (1 << bits) - 1
    return torch.cat([packed >> shift & mask for shift in range(8 - bits, -1, -bits)])
