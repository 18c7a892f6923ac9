"""bitsandbytes' 4-bit weights (NF4, FP4) as they are: the same codes, the same scales, our order.

bitsandbytes cuts a matrix, flattened, into blocks of 64 (mostly) with one scale each, and packs two neighbours into a
byte, the first into the high nibble. Where rows consist of whole groups of 32, 64 or 128 that lie within one block
each, the codebook scheme holds the same numbers: its float32 decoding equals bitsandbytes' own to the bit.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mebp_triton.kernels.layout import GROUP_SIZES, Int4Weight


def is_linear4bit(module: nn.Module) -> bool:
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def check_linear4bit(layer: Any, path: str) -> None:
    """ValueError where ``layer`` cannot be taken over exactly."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise ValueError(f"{path}: this Linear4bit is not quantised yet; move the model to its device first")
    if "packing_format_for_cpu" in vars(state):
        raise ValueError(
            f"{path}: bitsandbytes has rounded this layer's scales to bfloat16, as it does in the first forward pass "
            "in eval mode on this CPU; replace the layers before that, on a freshly loaded model"
        )
    _group_size(layer.in_features, state.blocksize, path)


def take_linear4bit(layer: Any, path: str) -> Int4Weight:
    """The weight ``[N, K]`` of a ``bitsandbytes.nn.Linear4bit``, on its device."""
    weight = int4_from_bitsandbytes(layer.state_dict(), "weight", path)
    # Layer and parameter refer to each other: they would stay until the next garbage collection.
    layer.weight.module = None
    return weight


def int4_from_bitsandbytes(tensors: Mapping[str, Tensor], name: str, where: str) -> Int4Weight:
    """From the tensors of a state dict or checkpoint; no bitsandbytes needed.

    Args:
        tensors: holds ``name`` and its companions, ``name + ".absmax"`` and so on.
        name: of the weight.
        where: what an error names.

    Raises:
        ValueError: the rows do not consist of whole groups that lie within a block each.
    """
    described = next(key for key in tensors if key.startswith(f"{name}.quant_state.bitsandbytes__"))
    state = json.loads(bytes(tensors[described].tolist()))
    rows, columns = state["shape"]
    group_size = _group_size(columns, state["blocksize"], where)
    packed = tensors[name].contiguous().view(torch.uint8).flatten()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(rows, columns)
    starts = torch.arange(0, rows * columns, group_size, device=packed.device)
    scales = _scales(tensors, name, state)[starts // state["blocksize"]].view(rows, -1).t()
    codebook = tensors[f"{name}.quant_map"].to(torch.float32)
    return Int4Weight.from_codes(codes, scales, group_size, codebook=codebook)


def _scales(tensors: Mapping[str, Tensor], name: str, state: dict[str, Any]) -> Tensor:
    """One per block, float32. Doubly quantised ones are decoded as bitsandbytes does it."""
    absmax = tensors[f"{name}.absmax"]
    if "nested_blocksize" not in state:
        return absmax.to(torch.float32)
    outer = tensors[f"{name}.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
    return tensors[f"{name}.nested_quant_map"][absmax.long()] * outer + state["nested_offset"]


def _group_size(in_features: int, blocksize: int, where: str) -> int:
    common = math.gcd(in_features, blocksize)
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    if not fitting:
        raise ValueError(
            f"{where}: in_features={in_features} is no multiple of 32, so bitsandbytes' blocks of {blocksize} cross "
            "its rows and cannot be taken over exactly; name it in exclude_modules, or load the model unquantised"
        )
    return max(fitting)
