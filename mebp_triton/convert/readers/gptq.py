"""Reads GPTQ directories, versions 1 and 2: codes, scales and zeros are kept as they are.

``qweight`` int32 ``[K * bits / 32, N]`` has its codes along K, ``qzeros`` int32 ``[groups, N * bits / 32]`` along N.
Both fill each word from its lowest bits up. ``scales`` is ``[groups, N]``, and ``g_idx`` ``[K]`` the group of each
input. A weight is ``(code - zero) * scale``. Version 1 stores zeros less one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.names import GROUP_SIZES_OF_BITS, Scheme

from .coded_matrix import CodedMatrix, unpack_bits
from .packed_dir import SCALES, PackedDirectory, Parts
from .source import NativeForm

STORED_LESS_ONE = "gptq"  # version 1; files that state no version are of it
FORMATS = (STORED_LESS_ONE, "gptq_v2")


class GptqDirectory(PackedDirectory):
    """The ``Source`` of such a directory."""

    quant_method = "gptq"
    title = "GPTQ"
    mark = "qweight"
    required = ("qzeros", "scales")
    optional = ("g_idx",)

    @staticmethod
    def native_form(settings: dict[str, Any]) -> NativeForm | None:
        if settings.get("desc_act") is True and settings.get("static_groups") is not True:
            return None  # in act-order
        return native_form_of(settings, settings.get("sym") is not False)

    def _check_settings(self) -> None:
        stated = [self.settings.get(key) for key in ("checkpoint_format", "format")]
        stated = [name for name in stated if name is not None] + ["marlin"] * bool(
            self.settings.get("is_marlin_format")
        )
        for name in stated:
            if name not in FORMATS:
                self.refuse(f"format {name!r:.100}", f"save it in the format {FORMATS[0]} or {FORMATS[1]}")
        if activation := self.settings.get("activation"):
            self.refuse(f"activations quantised as {activation!r:.100}")
        self._less_one = "gptq_v2" not in stated

    def _matrix(self, parts: Parts, rows: int, columns: int) -> CodedMatrix:
        return gptq_matrix(parts, rows, columns, self.settings.get("group_size"), self._less_one)


def native_form_of(settings: dict[str, Any], symmetric: bool) -> NativeForm | None:
    """The form of codes with float16 scales, which an affine minimum needs float32 for; None where they are decoded."""
    stated, size = settings.get("bits", settings.get("w_bit")), settings.get("group_size", settings.get("q_group_size"))
    if type(stated) is not int or not 2 <= stated <= 8 or type(size) is not int:
        return None
    forms = [
        (bits, ours)
        for bits, sizes in GROUP_SIZES_OF_BITS.items()
        for ours in sizes
        if stated <= bits and (size == -1 or (size > 0 and size % ours == 0))
    ]
    if not forms:
        return None
    # Of the least width that has fitting groups: the size itself, or the largest.
    bits, size = min(forms, key=lambda form: (form[0], form[1] != size, -form[1]))
    scheme: Scheme = "symmetric" if symmetric else "affine"
    return NativeForm(scheme, size, torch.float16 if symmetric else torch.float32, bits)


def gptq_matrix(parts: Parts, rows: int, columns: int, stated_size: Any, less_one: bool) -> CodedMatrix:
    """Reads a matrix ``[rows, columns]`` from the parts that GPTQ packs it in.

    Args:
        parts: qweight, qzeros, scales and perhaps g_idx.
        rows, columns: N and K.
        stated_size: the group size in the settings, which is not that of every layer.
        less_one: whether zeros are stored less one.
    """
    bits = parts.bits("qweight", columns, along=0)
    words = parts.read("qweight", ("I32",), (columns * bits // 32, rows))
    count = parts.shape("scales")[0]
    scales = parts.read("scales", SCALES, (count, rows))
    packed_zeros = parts.read("qzeros", ("I32",), (count, -(-rows * bits // 32)))
    groups, size = parts.groups(columns, count, stated_size)
    codes = unpack_bits(words.t(), bits)
    zeros = _zeros(packed_zeros, bits, less_one)[:, :rows]
    return CodedMatrix(codes, bits, scales, groups, size).with_zeros(zeros)


def _zeros(packed: Tensor, bits: int, less_one: bool) -> Tensor:
    """The zeros ``[groups, N]``, uint8."""
    if not less_one:
        return unpack_bits(packed, bits)
    if 32 % bits:
        return (unpack_bits(packed, bits) + 1) & (1 << bits) - 1
    # GPTQModel subtracted the ones from whole words: below a zero of 0, it borrowed from the next one.
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return unpack_bits(packed + torch.tensor(ones, dtype=torch.int32), bits)
