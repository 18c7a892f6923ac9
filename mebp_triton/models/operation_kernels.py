"""Whose kernels compute a block's small operations, and which activations they take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels import native_rows
from mebp_triton.kernels.native import instructions
from mebp_triton.kernels.reference import Activation, NormStyle


def has_kernels(backend: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels for activations of ``dtype``: by Triton, or on a CPU by compiled code, for float32."""
    compiled = device_type == "cpu" and dtype == torch.float32 and instructions() is not None
    return backend == "triton" or compiled


@dataclass(frozen=True)
class Kernels:
    """The three operations, and whether each can compute what it is given."""

    takes_norm: Callable[[Tensor, Tensor], bool]
    norm: Callable[[Tensor, Tensor, float, NormStyle], Tensor]
    takes_gate: Callable[[Tensor, Tensor, Activation], bool]
    gate: Callable[[Tensor, Tensor, Activation], Tensor]
    takes_rope: Callable[[Tensor, Tensor, Tensor, Tensor], bool]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@functools.cache
def kernels_of(backend: str) -> Kernels:
    """The operations by Triton for "triton", and by compiled code on a CPU for "panel"."""
    if backend == "panel":
        own = native_rows
        return Kernels(own.takes_norm, own.rms_norm, own.takes_gate, own.gated_activation, own.takes_rope, own.rope)
    from mebp_triton.kernels import gated_activation, rms_norm, rope  # which need the package triton

    return Kernels(
        rms_norm.takes,
        rms_norm.rms_norm,
        lambda gate, up, kind: gated_activation.takes(gate, up),
        gated_activation.gated_activation,
        rope.takes,
        rope.rope,
    )


@dataclass(frozen=True)
class Where:
    """The activations that kernels take: plain tensors of this kind of device and of this dtype.

    Attributes:
        kind: ``FakeTensor`` for a trace without data, in which nothing is launched.
        backend: whose kernels run; see ``kernels_of``.
    """

    device_type: str
    dtype: torch.dtype
    kind: type[Tensor] = Tensor
    backend: str = "triton"

    @property
    def kernels(self) -> Kernels:
        return kernels_of(self.backend)

    def holds(self, *tensors: Any) -> bool:
        if torch.compiler.is_compiling():
            return False
        return all(
            type(x) is self.kind and x.device.type == self.device_type and x.dtype == self.dtype for x in tensors
        )
