"""bitsandbytes' 4-bit layers (NF4, FP4) as int4 weights: the same codes and the same scales, in our order."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from mebp_triton.kernels.bitsandbytes import common_group_size, int4_from_bnb, resolve_absmax
from mebp_triton.kernels.layout import Int4Weight


def is_linear4bit(module: nn.Module) -> bool:
    """Whether ``module`` is a ``bitsandbytes.nn.Linear4bit``. The package is never imported for the question."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def check_linear4bit(layer: Any, path: str) -> None:
    """Raises ValueError where the weight of ``layer`` cannot be taken over exactly."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise ValueError(f"{path}: this Linear4bit is not quantised yet; move the model to its device first")
    if "packing_format_for_cpu" in vars(state):
        raise ValueError(
            f"{path}: bitsandbytes has rounded this layer's scales to bfloat16, as it does in the first forward pass "
            "in eval mode on this CPU; replace the layers before that, on a freshly loaded model"
        )
    if common_group_size(layer.in_features, state.blocksize) is None:
        raise ValueError(
            f"{path}: in_features={layer.in_features} is not a multiple of 32, so bitsandbytes' blocks of "
            f"{state.blocksize} cross its rows and cannot be taken over exactly; name it in exclude_modules, or load "
            f"the model unquantised"
        )


def int4_from_linear4bit(layer: Any) -> Int4Weight:
    """The weight ``[N, K]`` of a ``bitsandbytes.nn.Linear4bit``, on its device. The layer cannot be used afterwards."""
    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        outer = state.state2
        absmax = resolve_absmax(absmax, outer.code, outer.absmax, outer.blocksize, state.offset)
    rows, columns = state.shape
    weight = int4_from_bnb(layer.weight.data, absmax, state.code, (rows, columns), state.blocksize)
    # Layer and parameter refer to each other, and both would stay in memory until the next garbage collection.
    layer.weight.module = None
    return weight
