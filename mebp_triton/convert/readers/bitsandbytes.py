"""Reads model directories that bitsandbytes quantised to 4 bits (NF4, FP4): codes and scales are kept bit for bit.

bitsandbytes itself is not needed. It flattens a weight ``[out, in]`` row by row and packs two codes into a byte, the
first in the high nibble. Every ``blocksize`` weights of the flat matrix share an absmax, which may be quantised in turn
("double quantisation"). Beside ``<weight>`` lie ``.absmax``, ``.quant_map`` (16 levels), ``.nested_absmax``,
``.nested_quant_map`` and, as JSON in bytes, ``.quant_state.bitsandbytes__<type>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.bitsandbytes import int4_from_bnb, resolve_absmax
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.models.names import check_shape
from mebp_triton.system import strict_json
from mebp_triton.system.foreign_errors import is_out_of_memory

from .safetensors_dir import FLOATS, SafetensorsDirectory
from .source import NativeForm

PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.")
STATES = tuple(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
# torch's own error for tensors of wrong shapes is a RuntimeError.
UNREADABLE: tuple[type[Exception], ...] = (*strict_json.MALFORMED, RuntimeError)


class BitsandbytesDirectory(SafetensorsDirectory):
    """The ``Source`` of a model directory that bitsandbytes quantised to 4 bits."""

    quant_method = "bitsandbytes"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        settings = self.quantization.settings if self.quantization else {}
        if settings.get("load_in_4bit") is not True:
            raise ValueError(
                f"{path / 'config.json'}: bitsandbytes with {8 if settings.get('load_in_8bit') else 'no stated'} bits "
                f"is not supported, only load_in_4bit: give a 4-bit or the unquantised model"
            )
        self.description = f"bitsandbytes directory {path.resolve().name}"

    @staticmethod
    def native_form(settings: dict[str, Any]) -> NativeForm | None:
        return NativeForm("codebook", 64, torch.float32)

    def _usable(self, key: str) -> bool:
        return self._entries[key].dtype in FLOATS or self._state(key) is not None

    def _belongs(self, key: str, used: set[str]) -> bool:
        return key in used or any(key.rpartition(f".{part}")[0] in used for part in PARTS)

    def _state(self, key: str) -> str | None:
        """The name of the tensor that describes how ``key`` is quantised; None if it is a plain float."""
        return next((key + state for state in STATES if key + state in self._entries), None)

    def value(self, name: str, key: str, shape: tuple[int, ...]) -> Tensor | Int4Weight:
        described = self._state(key)
        if described is None:
            return super().value(name, key, shape)
        where = f"{self._entries[key].file}: {key}"
        state = strict_json.parse_json(self._tensor(described).numpy().tobytes(), described)
        try:
            weight = self._weight(key, state)
        except UNREADABLE as error:
            if is_out_of_memory(error):
                raise
            problem = str(error) if type(error) is ValueError else f"damaged, {type(error).__name__}: {error}"
            raise ValueError(f"{where}: {' '.join(problem.split())}") from None
        check_shape(str(self._entries[key].file), name, weight.shape, shape)
        return weight

    def _weight(self, key: str, state: dict[str, Any]) -> Int4Weight:
        absmax = self._tensor(f"{key}.absmax")
        if "nested_blocksize" in state:
            quant_map, nested = self._tensor(f"{key}.nested_quant_map"), self._tensor(f"{key}.nested_absmax")
            # This is a level of a map times a scale, plus an offset: no product of a byte and a scale, which two levels
            # could hold, so it becomes float32.
            absmax = resolve_absmax(absmax, quant_map, nested, state["nested_blocksize"], state["nested_offset"])
        rows, columns = state["shape"]
        return int4_from_bnb(
            self._tensor(key), absmax, self._tensor(f"{key}.quant_map"), (rows, columns), state["blocksize"]
        )
