"""Reads AWQ directories in the layout "gemm": codes, scales and zeros are kept as they are.

``qweight`` int32 ``[K, N / 8]`` and ``qzeros`` int32 ``[groups, N / 8]`` have eight neighbouring outputs in a word, in
the order of ``ORDER``. ``scales`` is ``[groups, N]``. A weight is ``(code - zero) * scale``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .coded_matrix import CodedMatrix, unpack_bits
from .gptq import native_form_of
from .packed_dir import SCALES, PackedDirectory, Parts
from .source import NativeForm

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word belongs to, from the lowest nibble up
GEMM = "gemm"
ELSEWHERE = "give the checkpoint in the layout gemm, or the unquantised model"


class AwqDirectory(PackedDirectory):
    """The ``Source`` of such a directory."""

    quant_method = "awq"
    title = "AWQ"
    mark = "qweight"
    required = ("qzeros", "scales")

    @staticmethod
    def native_form(settings: dict[str, Any]) -> NativeForm | None:
        return native_form_of(settings, symmetric=False)

    def _check_settings(self) -> None:
        for key in ("version", "format", "checkpoint_format"):
            if str(self.settings.get(key, GEMM)).lower() != GEMM:
                self.refuse(f"{key} {self.settings[key]!r:.100}", ELSEWHERE)
        if self.settings.get("backend") == "llm-awq":
            self.refuse("backend 'llm-awq'", ELSEWHERE)
        bits = self.settings.get("bits", self.settings.get("w_bit", 4))
        if bits != 4:
            self.refuse(f"{bits!r:.100} bits")
        scaled = next((key for key in self._entries if key.endswith(".act.scales")), None)
        if scaled is not None:
            self.refuse(f"scaled activations ({scaled}), with which the model is no ordinary one")

    def _matrix(self, parts: Parts, rows: int, columns: int) -> CodedMatrix:
        size = self.settings.get("group_size", self.settings.get("q_group_size"))
        return awq_matrix(parts, rows, columns, size)


def awq_matrix(parts: Parts, rows: int, columns: int, stated_size: Any) -> CodedMatrix:
    """Reads a matrix ``[rows, columns]`` from the parts that AWQ packs it in; see ``gptq_matrix``."""
    count = parts.shape("scales")[0]
    words = parts.read("qweight", ("I32",), (columns, -(-rows // 8)))
    scales = parts.read("scales", SCALES, (count, rows))
    packed_zeros = parts.read("qzeros", ("I32",), (count, -(-rows // 8)))
    groups, size = parts.groups(columns, count, stated_size)
    codes = _unpack(words)[:, :rows].t()
    return CodedMatrix(codes, 4, scales, groups, size).with_zeros(_unpack(packed_zeros)[:, :rows])


def _unpack(words: Tensor) -> Tensor:
    """Codes in the order of outputs, ``[..., 8 * W]`` uint8."""
    places = [ORDER.index(output) for output in range(8)]
    return unpack_bits(words, 4).unflatten(-1, (-1, 8))[..., places].flatten(-2)
