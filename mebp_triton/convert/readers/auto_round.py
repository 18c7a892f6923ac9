"""Reads AutoRound directories, whose layers are packed as GPTQ's or as AWQ's."""

from __future__ import annotations

from typing import Any

from .awq import awq_matrix
from .coded_matrix import CodedMatrix
from .gptq import gptq_matrix, native_form_of
from .packed_dir import PackedDirectory, Parts
from .source import NativeForm

# What packing_format names, and whether zeros are stored less one there; None for AWQ's layout.
PACKINGS = {
    "auto_round": False,
    "auto_round:gptqmodel": False,
    "auto_round:auto_gptq": True,
    "auto_round:auto_awq": None,
}
ELSEWHERE = f"export the model as one of {', '.join(PACKINGS)}, or give the unquantised one"


class AutoRoundDirectory(PackedDirectory):
    """The ``Source`` of such a directory."""

    quant_method = "auto-round"
    title = "AutoRound"
    mark = "qweight"
    required = ("qzeros", "scales")
    optional = ("g_idx",)

    @staticmethod
    def native_form(settings: dict[str, Any]) -> NativeForm | None:
        return native_form_of(settings, settings.get("sym") is not False)

    def _check_settings(self) -> None:
        packing = self.settings.get("packing_format", "auto_round:auto_gptq")
        if not isinstance(packing, str) or packing not in PACKINGS:
            self.refuse(f"packing_format {packing!r:.100}", ELSEWHERE)
        self._less_one = PACKINGS[packing]
        act_bits = self.settings.get("act_bits")
        if act_bits is not None and act_bits != 16:
            self.refuse(f"activations of {act_bits!r:.100} bits")

    def _matrix(self, parts: Parts, rows: int, columns: int) -> CodedMatrix:
        size = self.settings.get("group_size")
        if self._less_one is None:
            return awq_matrix(parts, rows, columns, size)
        return gptq_matrix(parts, rows, columns, size, self._less_one)
