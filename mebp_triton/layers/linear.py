"""LoRA over an int4 weight: the autograd function and the layers.

``Y = X·Wᵀ + bias + s·(X·Aᵀ)·Bᵀ``; backward, with ``g = s·dY·B``: ``dX = dY·W + g·A``, ``dA = gᵀ·X``,
``dB = s·dYᵀ·(X·Aᵀ)``. Nothing of size ``[N, K]`` is allocated; ``s·X·Aᵀ`` ``[M, R]`` is kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mebp_triton.kernels.functions import (
    int4_matmul,
)
from mebp_triton.kernels.layout import Int4Weight

from .int4_module import Int4Module
from .lora_function import LoraOperand, autocast_input, int4_lora_linears


class Int4Linear(Int4Module, nn.Linear):
    """A frozen linear layer over an int4 weight.

    A subclass of ``nn.Linear`` whose ``weight`` is the packed uint8 tensor: tools that look for a linear layer, such
    as PEFT, find one and leave its weight alone.
    """

    def __init__(
        self, weight: Int4Weight, bias: Tensor | None, compute_dtype: torch.dtype, backend: str = "auto"
    ) -> None:
        nn.Module.__init__(self)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._init_int4(weight, compute_dtype, backend)

    def _set_packed(self, packed: Tensor) -> None:
        self._parameters["weight"] = nn.Parameter(packed, requires_grad=False)

    def _packed(self) -> Tensor:
        return self.weight.data

    def forward(self, x: Tensor) -> Tensor:
        x = autocast_input(x)
        return int4_matmul(x, self.int4(), self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        scheme = self.int4().scheme
        return f"in_features={self.in_features}, out_features={self.out_features}, {scheme}, G={self.group_size}"


class ComputedTogether(Protocol):
    """Layers with one input: the first one that is called computes the outputs of all."""

    def output_of(self, layer: Int4LoRALinear, x: Tensor) -> Tensor:
        """``layer``'s output ``[..., N]`` for ``x`` ``[..., K]``."""
        ...

    def forget(self) -> None:
        """Lets go of outputs that nobody asked for."""
        ...


class Tape(Protocol):
    """What a block's recompute need not compute again."""

    def known(self, layer: Int4LoRALinear, x: Tensor) -> Tensor | None:
        """The output of ``layer`` for ``x`` at its next call, if it is known."""
        ...

    def passed(self, layer: Int4LoRALinear, y: Tensor) -> None:
        """A call of ``layer`` gave ``y``."""
        ...


class Int4LoRALinear(Int4Linear):
    """``Int4Linear`` with a LoRA adapter: ``lora_A`` ``[R, K]`` (PEFT's initialisation), ``lora_B`` ``[N, R]`` (zeros).

    Attributes:
        fan_in_fan_out: the float layer kept its weight as ``[in, out]``; only who merges the adapter needs to know.
        shared_input: the layers that read the same input as this one and are computed together with it; see
            ``SharedInput``. None where the layer is computed alone.
        tape: knows outputs of this layer already, or wants to; see ``backprop``.
    """

    fan_in_fan_out = False
    shared_input: ComputedTogether | None = None
    tape: Tape | None = None

    def __init__(
        self,
        weight: Int4Weight,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(weight, bias, compute_dtype, backend)
        self.scaling = scaling
        self.lora_dropout = nn.Dropout(dropout)
        bound = 1 / math.sqrt(self.in_features)
        a = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        device = weight.device if device is None else device
        self.lora_A = nn.Parameter(a.to(device, adapter_dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=adapter_dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.lora_dropout.p > 0:
            # The two branches see different inputs, so the LoRA one has its own operations.
            x = autocast_input(x)
            t = (self.lora_dropout(x) @ self.lora_A.to(x.dtype).t()) * self.scaling
            return int4_matmul(x, self.int4(), self.bias, t, self.lora_B, self.backend)
        y = compute_together([self], x)[0] if self.shared_input is None else self.shared_input.output_of(self, x)
        if self.tape is not None:
            self.tape.passed(self, y)
        return y

    def operand(self) -> LoraOperand:
        return LoraOperand(self.int4(), self.bias, self.lora_A, self.lora_B, self.scaling)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.lora_A.shape[0]}"


def compute_together(layers: Sequence[Int4LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of layers with one input; those that a tape knows are not computed, if it knows all of them."""
    known = [None if layer.tape is None else layer.tape.known(layer, x) for layer in layers]
    outputs = tuple(y for y in known if y is not None)
    whole = outputs if len(outputs) == len(layers) else None
    return int4_lora_linears(x, [layer.operand() for layer in layers], layers[0].backend, whole)
