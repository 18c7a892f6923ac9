"""What the kernels' launches share: a weight's arguments, and checks of the operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .configs import MOST_MEMBERS
from .layout import Int4Weight

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weight_arguments(*weights: Int4Weight) -> dict[str, Any]:
    """What every kernel takes of a weight: pointers, strides and the flags of its scheme; of a group, of every member.

    Members that are not there repeat the last one, and have no rows.
    """
    head = weights[0]
    padded = (*weights, *[weights[-1]] * (MOST_MEMBERS - len(weights)))
    arguments: dict[str, Any] = {
        "stride_pn": head.packed.stride(0),
        "stride_pj": head.packed.stride(1),
        "stride_sn": head.scales.stride(1),
        "stride_zn": 0 if head.minimum is None else head.minimum.stride(1),
        "GROUP": head.group_size,
        "HAS_MINIMUM": head.minimum is not None,
        "HAS_CODEBOOK": head.codebook is not None,
        "MEMBERS": len(weights),
    }
    for index, (weight, suffix) in enumerate(zip(padded, ("", "1", "2"), strict=True)):
        used = index == 0 or len(weights) > 1
        minimum = weight.minimum
        arguments |= {
            f"packed{suffix}_ptr": weight.packed if used else None,
            f"scales{suffix}_ptr": weight.scales if used else None,
            f"minimum{suffix}_ptr": minimum if used else None,
            f"codebook{suffix}_ptr": weight.codebook if used else None,
            f"stride_sg{suffix}": weight.scales.stride(0) if used else 0,
            f"stride_zg{suffix}": minimum.stride(0) if used and minimum is not None else 0,
            f"N{suffix}": weight.out_features if index < len(weights) else 0,
        }
    return arguments


def runs_compiled(kernel: Any) -> bool:
    """Whether inline PTX can be used: not in Triton's interpreter, and not on ROCm."""
    return isinstance(kernel, triton.runtime.JITFunction) and torch.version.hip is None


def check_operand(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ``ValueError`` unless ``tensor`` is a float tensor of that shape on that device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be one of {FLOAT_DTYPES}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where the weight is, got {tensor.device}")


def can_group(weights: Sequence[Int4Weight]) -> bool:
    """Whether one launch can take these weights with one input: all must be alike but for their rows."""
    if not 1 <= len(weights) <= MOST_MEMBERS:
        return False
    kinds = {
        (
            weight.in_features,
            weight.group_size,
            weight.scheme,
            weight.scales.dtype,
            weight.device,
            weight.packed.stride(),
            weight.scales.stride(1),
            None if weight.minimum is None else (weight.minimum.dtype, weight.minimum.stride(1)),
        )
        for weight in weights
    }
    return len(kinds) == 1
