"""Which implementation runs an operation: Triton or plain torch, and by which route."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .configs import Kernel, Problem
from .layout import Int4Weight
from .names import BACKENDS
from .tables import Route, architecture_of, choose, refuse

Result = TypeVar("Result")


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def resolve_backend(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> Literal["triton", "panel"]:
    """The backend that ``backend`` means for this device and dtype. ValueError for an unknown or impossible one."""
    if backend == "auto":
        by_triton = device.type == "cuda" and has_triton() and dtype != torch.float64
        # Before sm_80 there are no bfloat16 instructions.
        if by_triton and dtype == torch.bfloat16 and torch.version.hip is None:
            by_triton = torch.cuda.get_device_capability(device) >= (8, 0)
        return "triton" if by_triton else "panel"
    if backend == "panel":
        return "panel"
    if backend != "triton":
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not has_triton():
        raise ValueError("backend 'triton' needs the package triton, which is not installed; use 'panel'")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend 'triton' runs on a GPU, and the tensors are on the CPU; use 'panel' or 'auto'")
    return "triton"


def routed(kernel: Kernel, operand: Tensor, weights: Sequence[Int4Weight], launch: Callable[[Route], Result]) -> Result:
    """Launches by the route that the tables give. One that the device has no room for is not taken again."""
    head, n = weights[0], sum(weight.out_features for weight in weights)
    problem = Problem(kernel, operand.shape[0], n, head.in_features, head.scheme, head.group_size, operand.dtype)
    architecture = architecture_of(operand.device)
    from triton.runtime.errors import OutOfResources

    try:
        return launch(choose(problem, architecture))
    except OutOfResources as error:
        warnings.warn(f"{choose(problem, architecture)} does not fit this device ({error}): tune again", stacklevel=2)
        refuse(problem, architecture)
    return launch(choose(problem, architecture))
