"""Model directories that bitsandbytes quantised to 4 bits (NF4, FP4): codes and scales are taken over bit for bit.

bitsandbytes itself is not needed. It flattens a weight ``[out, in]`` row by row and packs two codes a byte, the first
in the high nibble; every ``blocksize`` flat weights share an absmax, which may be quantised in turn ("double
quantisation"). Beside ``<weight>`` lie ``.absmax``, ``.quant_map`` (16 levels), ``.nested_absmax``,
``.nested_quant_map`` and, as JSON in bytes, ``.quant_state.bitsandbytes__<type>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mebp_triton import files
from mebp_triton.kernels.layout import GROUP_SIZES, Int4Weight

from . import check_shape
from .safetensors_dir import FLOATS, SafetensorsDirectory

PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.")
STATES = tuple(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
# What looking into JSON of another form than expected raises, and tensors of other shapes.
MALFORMED = (KeyError, TypeError, ValueError, RuntimeError, IndexError, OverflowError)


def common_group_size(columns: int, blocksize: int) -> int | None:
    """The largest of ours that cuts rows and blocks alike: no group may have a part in two blocks. None: no such."""
    return max((size for size in GROUP_SIZES if columns % size == 0 and blocksize % size == 0), default=None)


def int4_from_bnb(
    packed: Tensor, absmax: Tensor, codebook: Tensor, shape: tuple[int, int], blocksize: int
) -> Int4Weight:
    """The weight that bitsandbytes holds as these tensors, exactly.

    Args:
        packed: ``N * K / 2`` bytes in any shape and dtype; the first of two codes in the high nibble.
        absmax: ``[ceil(N * K / blocksize)]`` float32, see ``resolve_absmax``.
        codebook: ``[16]``, bitsandbytes' ``code``.
        shape: (N, K): out and in features.
        blocksize: flat weights per absmax.

    Raises:
        ValueError: a tensor has another size, or K does not consist of whole groups that lie within a block.
    """
    rows, columns = shape
    if any(type(size) is not int or size < 1 for size in (rows, columns, blocksize)):
        raise ValueError(f"shape and blocksize must be positive integers, got {shape!r:.100} and {blocksize!r:.100}")
    group_size = common_group_size(columns, blocksize)
    if group_size is None:
        raise ValueError(
            f"in_features {columns} is no multiple of 32 (blocks of {blocksize} weights go on from row to row), "
            f"which cannot be taken over: give the unquantised model"
        )
    data = packed.contiguous().view(torch.uint8).flatten()
    blocks = -(-rows * columns // blocksize)
    for name, tensor, wanted in (("packed", data, rows * columns // 2), ("absmax", absmax, blocks)):
        if tensor.numel() != wanted:
            raise ValueError(f"{name} has {tensor.numel()} elements, wanted {wanted} for a weight of shape {shape}")
    if not absmax.isfinite().all():
        raise ValueError("absmax is not finite")
    if not codebook.isfinite().all():
        raise ValueError("codebook must be finite")
    codes = torch.stack((data >> 4, data & 15), dim=1).view(rows, columns)
    block_of_group = torch.arange(0, rows * columns, group_size, device=absmax.device) // blocksize
    scales = absmax.flatten().float()[block_of_group].view(rows, -1).t()
    return Int4Weight.from_codes(codes, scales, group_size, codebook=codebook.float())


def resolve_absmax(
    absmax: Tensor, quant_map: Tensor, nested_absmax: Tensor, nested_blocksize: int, offset: float | Tensor
) -> Tensor:
    """float32 absmax from its own quantised form: uint8 codes, a map of 256 levels, a scale per block, an offset."""
    if type(nested_blocksize) is not int or nested_blocksize < 1:
        raise ValueError(f"nested_blocksize must be a positive integer, got {nested_blocksize!r:.100}")
    nested = torch.arange(absmax.numel(), device=absmax.device) // nested_blocksize
    return quant_map[absmax.flatten().long()] * nested_absmax.flatten()[nested] + offset


class BitsandbytesDirectory(SafetensorsDirectory):
    """The ``Source`` of a model directory with ``quant_method`` bitsandbytes, 4 bits."""

    quant_method = "bitsandbytes"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        settings = self._config_json.pop("quantization_config")
        if settings.get("load_in_4bit") is not True:
            raise ValueError(
                f"{path / 'config.json'}: bitsandbytes with {8 if settings.get('load_in_8bit') else 'no stated'} bits "
                f"is not supported, only load_in_4bit: give a 4-bit or the unquantised model"
            )
        del self.config.quantization_config
        self.description = f"bitsandbytes directory {path.resolve().name}"

    def _usable(self, key: str) -> bool:
        return self._entries[key].dtype in FLOATS or self._state(key) is not None

    def _is_part(self, key: str, used: set[str]) -> bool:
        return key in used or any(key.rpartition(f".{part}")[0] in used for part in PARTS)

    def _state(self, key: str) -> str | None:
        """The name of the tensor that describes how ``key`` is quantised, None if it is a plain float."""
        return next((key + state for state in STATES if key + state in self._entries), None)

    def read(self, name: str) -> Tensor | Int4Weight:
        key = self._keys[name]
        described = self._state(key)
        if described is None:
            return super().read(name)
        where = f"{self._entries[key].file}: {key}"
        state = files.parse_json(self._tensor(described).numpy().tobytes(), described)
        try:
            weight = self._weight(key, state)
        except MALFORMED as error:
            problem = str(error) if type(error) is ValueError else f"damaged, {type(error).__name__}: {error}"
            raise ValueError(f"{where}: {' '.join(problem.split())}") from None
        check_shape(str(self._entries[key].file), name, weight.shape, self._int4_shape(name))
        return weight

    def _weight(self, key: str, state: dict[str, Any]) -> Int4Weight:
        absmax = self._tensor(f"{key}.absmax")
        if "nested_blocksize" in state:
            quant_map, nested = self._tensor(f"{key}.nested_quant_map"), self._tensor(f"{key}.nested_absmax")
            absmax = resolve_absmax(absmax, quant_map, nested, state["nested_blocksize"], state["nested_offset"])
        rows, columns = state["shape"]
        return int4_from_bnb(
            self._tensor(key), absmax, self._tensor(f"{key}.quant_map"), (rows, columns), state["blocksize"]
        )
