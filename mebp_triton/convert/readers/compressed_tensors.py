"""Reads compressed-tensors directories: integer codes ("pack-quantized") and MXFP4 are kept as they are.

``weight_packed`` int32 ``[N, K * bits / 32]`` has its codes along K from the lowest bits up, and ``weight_scale`` is
``[N, groups]``. Codes are signed and stored with 2 ** (bits - 1) added, and so is ``weight_zero_point``, int32
``[N * bits / 32, groups]``, whose codes lie along N. MXFP4 has ``weight_packed`` uint8 ``[N, K / 2]``, the low nibble
first, and ``weight_scale`` uint8, exponents of 2 with a bias of 127.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .coded_matrix import E2M1, CodedMatrix, even_groups, powers_of_two, unpack_bits
from .gptq import native_form_of
from .packed_dir import SCALES, PackedDirectory, Parts
from .source import NativeForm

INTEGERS, MXFP4 = "pack-quantized", "mxfp4-pack-quantized"
FORMATS = (INTEGERS, MXFP4, "mixed-precision", "dense")
DENSE = "give the unquantised, dense model"


class CompressedTensorsDirectory(PackedDirectory):
    """The ``Source`` of such a directory."""

    quant_method = "compressed-tensors"
    title = "compressed-tensors"
    mark = "weight_packed"
    required = ("weight_scale",)
    optional = ("weight_shape", "weight_zero_point", "weight_g_idx")

    @staticmethod
    def native_form(settings: dict[str, Any]) -> NativeForm | None:
        if settings.get("format") == MXFP4:
            return NativeForm("codebook", 32, torch.float16)
        weights = _weights(next(iter(_groups(settings)), {}))
        stated = {"bits": weights.get("num_bits"), "group_size": weights.get("group_size") or -1}
        return native_form_of(stated, weights.get("symmetric") is not False)

    def _check_settings(self) -> None:
        groups = _groups(self.settings)
        for settings in (self.settings, *groups):
            if settings.get("format", INTEGERS) not in (*FORMATS, None):
                self.refuse(f"format {settings['format']!r:.100}")
        transforms, sparsity = self.settings.get("transform_config"), self.settings.get("sparsity_config")
        if transforms:
            self.refuse("transform_config, which rotates weights and activations", DENSE)
        if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
            self.refuse(f"sparsity_config {sparsity!r:.100}", DENSE)
        for group in groups:
            for side in ("input_activations", "output_activations"):
                if group.get(side):
                    self.refuse(f"{side} that are quantised")
            strategy = _weights(group).get("strategy")
            if strategy not in (None, "group", "channel"):
                self.refuse(f"strategy {strategy!r:.100}")
        if self.settings.get("kv_cache_scheme"):
            warnings.warn(
                f"{self.path}: kv_cache_scheme, the rounding of cached keys and values, has no effect on a store",
                stacklevel=4,
            )
        sizes = [_weights(group).get("group_size") for group in groups]
        self._sizes = [size for size in sizes if type(size) is int and size > 0]
        widths = [_weights(group).get("num_bits") for group in groups]
        self._widths = [width for width in widths if type(width) is int and 2 <= width <= 8]
        self._is_affine = bool(groups) and all(_weights(group).get("symmetric") is False for group in groups)

    def _belongs(self, key: str, used: set[str]) -> bool:
        is_of_the_cache = key.rpartition(".")[2] in ("k_scale", "v_scale", "k_zero_point", "v_zero_point")
        return super()._belongs(key, used) or (is_of_the_cache and bool(self.settings.get("kv_cache_scheme")))

    def _matrix(self, parts: Parts, rows: int, columns: int) -> CodedMatrix:
        self._check_stated_shape(parts, "weight_shape", (rows, columns))
        count = parts.shape("weight_scale")[1]
        if parts.entries["weight_packed"].dtype == "U8":
            return _mxfp4(parts, rows, columns)
        bits = self._bits(parts, columns)
        words = parts.read("weight_packed", ("I32",), (rows, -(-columns * bits // 32)))
        scales = parts.read("weight_scale", SCALES, (rows, count)).t()
        stated = next((size for size in self._sizes if -(-columns // size) == count), None)
        groups, size = parts.groups(columns, count, stated, "weight_scale", "weight_g_idx")
        matrix = CodedMatrix(unpack_bits(words, bits)[:, :columns], bits, scales, groups, size)
        if "weight_zero_point" in parts:
            return matrix.with_zeros(_zeros(parts, bits, rows, count))
        if self._is_affine:
            parts.fail("weight_packed", "has no weight_zero_point, and config.json says that it is not symmetric")
        return matrix

    def _bits(self, parts: Parts, columns: int) -> int:
        """The width of the codes: one that the settings state and the words hold."""
        words = parts.shape("weight_packed")[1]
        for width in self._widths:
            # Where 32 is no multiple of the width, older versions left the rest of each word unused.
            if -(-columns * width // 32) != words == -(-columns // (32 // width)):
                self.refuse(f"num_bits {width}, and {parts.module}.weight_packed has unused bits in each word")
        return parts.bits("weight_packed", columns, 1, self._widths)


def _zeros(parts: Parts, bits: int, rows: int, count: int) -> Tensor:
    """The zeros ``[groups, N]``, as they are added to codes; older versions did not pack them."""
    if parts.entries["weight_zero_point"].dtype == "I8":
        return parts.read("weight_zero_point", ("I8",), (rows, count)).t().int() + (1 << (bits - 1))
    words = parts.read("weight_zero_point", ("I32",), (-(-rows * bits // 32), count))
    return unpack_bits(words.t(), bits)[:, :rows]


def _mxfp4(parts: Parts, rows: int, columns: int) -> CodedMatrix:
    codes = unpack_bits(parts.read("weight_packed", ("U8",), (rows, -(-columns // 2))), 4)[:, :columns]
    exponents = parts.read("weight_scale", ("U8",), (rows, -(-columns // 32)))
    return CodedMatrix(codes, 4, powers_of_two(exponents).t(), even_groups(columns, 32), 32, levels=E2M1)


def _groups(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of every group of layers; of what is no object, nothing."""
    groups = settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _weights(group: dict[str, Any]) -> dict[str, Any]:
    weights = group.get("weights")
    return weights if isinstance(weights, dict) else {}
