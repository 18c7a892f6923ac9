"""Parts that all launches share: a weight's arguments, and checks of the operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .configs import MOST_MEMBERS
from .layout import TENSORS, Int4Weight

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def of_members(values: Sequence[Any], missing: Any = None) -> tuple[Any, ...]:
    """A kernel's argument with one value for each member of a group: a tuple of always ``MOST_MEMBERS`` values.

    A group of two repeats its last value, for a third member without rows. A weight alone is followed by ``missing``.
    """
    filler = values[-1] if len(values) > 1 else missing
    return (*values, *[filler] * (MOST_MEMBERS - len(values)))


def weight_arguments(weights: Sequence[Int4Weight]) -> dict[str, Any]:
    """A kernel's arguments for a group of weights: pointers, sizes and strides by member; flags of the scheme."""

    def strides_of(name: str) -> tuple[int, ...]:
        return of_members([stride_of(getattr(weight, name), 0) for weight in weights], 0)

    return {
        **{f"{name}_of": of_members([getattr(weight, name) for weight in weights]) for name in TENSORS},
        "N_of": (*[weight.out_features for weight in weights], *[0] * (MOST_MEMBERS - len(weights))),
        "stride_sg_of": strides_of("scales"),
        "stride_zg_of": strides_of("minimum"),
        "stride_ug_of": strides_of("super_scales"),
        "stride_vg_of": strides_of("super_minimum"),
        **scheme_arguments(weights[0]),
        "MEMBERS": len(weights),
    }


def stride_of(tensor: Tensor | None, axis: int) -> int:
    """The stride of a tensor that may be missing, and then has 0."""
    return 0 if tensor is None else tensor.stride(axis)


def scheme_arguments(weight: Int4Weight) -> dict[str, Any]:
    """Arguments that are the same for all weights of a launch, as ``can_group`` makes sure."""
    return {
        "stride_pn": weight.packed.stride(0),
        "stride_pj": weight.packed.stride(1),
        "stride_sn": weight.scales.stride(1),
        "stride_zn": stride_of(weight.minimum, 1),
        "stride_un": stride_of(weight.super_scales, 1),
        "stride_vn": stride_of(weight.super_minimum, 1),
        "BITS": weight.bits,
        "GROUP": weight.group_size,
        "HAS_MINIMUM": weight.minimum is not None,
        "HAS_CODEBOOK": weight.codebook is not None,
    }


def has_data(out: Tensor) -> bool:
    """Whether there is anything to launch for an output: not if it is empty, nor in a trace without data."""
    return out.numel() > 0 and not isinstance(out, FakeTensor)


def column_stride(operands: Sequence[Tensor]) -> int:
    """The stride along N that all operands ``[M, N_i]`` share. One with a single column has none."""
    return next((one.stride(1) for one in operands if one.shape[1] > 1), 1)


def runs_compiled(kernel: Any) -> bool:
    """Whether the kernel may use inline PTX: it may not in Triton's interpreter, nor on ROCm."""
    return isinstance(kernel, triton.runtime.JITFunction) and torch.version.hip is None


def check_operand(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError unless ``tensor`` is a float tensor of that shape on that device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be one of {FLOAT_DTYPES}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where the weight is, got {tensor.device}")


def can_group(weights: Sequence[Int4Weight]) -> bool:
    """Whether one launch can take these weights with one input: they may differ in nothing but their rows."""
    if not 1 <= len(weights) <= MOST_MEMBERS:
        return False
    kinds = {
        (
            weight.in_features,
            weight.group_size,
            weight.scheme,
            weight.bits,
            weight.device,
            weight.packed.stride(),
            *((tensor.dtype, tensor.stride(-1)) for tensor in weight.tensors().values()),
        )
        for weight in weights
    }
    return len(kinds) == 1
