"""The linear layers over an int4 weight: frozen, and with a LoRA adapter.

An adapted layer knows two things about its surroundings by protocol alone: the layers that read the same input
(``ComputedTogether``), and what a recompute of its block need not compute (``Tape``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mebp_triton.kernels.functions import int4_matmul
from mebp_triton.kernels.layout import Int4Weight

from .int4_module import Int4Module
from .lora_function import LoraOperand, autocast_input, int4_lora_linears
from .stacked_adapters import BlockAdapters, Stacked


class Int4Linear(Int4Module, nn.Linear):
    """A frozen linear layer over an int4 weight.

    It is an ``nn.Linear`` whose ``weight`` is the packed uint8 tensor, so that tools which look for linear layers, such
    as PEFT, find it and leave its weight alone.
    """

    def __init__(
        self, weight: Int4Weight, bias: Tensor | None, compute_dtype: torch.dtype, backend: str = "auto"
    ) -> None:
        nn.Module.__init__(self)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._init_int4(weight, compute_dtype, backend)

    def _set_packed(self, packed: Tensor) -> None:
        is_parameter = type(packed) is nn.Parameter
        own: Any = packed if is_parameter else nn.Parameter(packed, requires_grad=False)
        self._parameters["weight"] = own

    def _packed(self) -> Tensor:
        packed: Any = self._parameters["weight"]
        return packed

    def forward(self, x: Tensor) -> Tensor:
        x = autocast_input(x)
        return int4_matmul(x, self.int4(), self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.int4().form}"


class ComputedTogether(Protocol):
    """Layers with one input, of which the first that is called computes the outputs of all. See ``SharedInput``."""

    def output_of(self, layer: Int4LoRALinear, x: Tensor) -> Tensor:
        """The output ``[..., N]`` of ``layer`` for ``x`` ``[..., K]``."""
        ...

    def forget(self) -> None:
        """Drops outputs that were computed and not asked for."""
        ...


class Tape(Protocol):
    """The outputs of a block's layers, recorded in its forward pass and looked up when the block is recomputed."""

    def lookup(self, layer: Int4LoRALinear, x: Tensor) -> Tensor | None:
        """The output of the next call of ``layer``, which gets ``x``; None if it must be computed."""
        ...

    def record(self, layer: Int4LoRALinear, y: Tensor) -> None:
        """Takes note of a call of ``layer`` that returned ``y``."""
        ...


class Int4LoRALinear(Int4Linear):
    """``Int4Linear`` with a LoRA adapter: ``lora_A`` ``[R, K]`` (PEFT's initialisation), ``lora_B`` ``[N, R]`` (zeros).

    Attributes:
        fan_in_fan_out: whether the float layer kept its weight as ``[in, out]``; merging the adapter depends on it.
        shared_input: the layers that read the same input and are computed together with this one; None if it is
            computed alone.
        tape: set by the layer's block during a forward pass to be recorded, or a recompute; see ``blocks.recompute``.
        stacks: the adapters of all of the block's layers, set during its passes; see ``BlockAdapters``.
    """

    fan_in_fan_out = False
    shared_input: ComputedTogether | None = None
    tape: Tape | None = None
    stacks: BlockAdapters | None = None

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
        if self.drops_out():
            # Such a layer is computed alone, and not taped: the two branches see different inputs.
            x = autocast_input(x)
            dropped = self.lora_dropout(x)
            return int4_lora_linears(x, [self.operand()], self.backend, None, _stacked([self], x), dropped)[0]
        y = compute_together([self], x)[0] if self.shared_input is None else self.shared_input.output_of(self, x)
        if self.tape is not None:
            self.tape.record(self, y)
        return y

    def drops_out(self) -> bool:
        """Whether the LoRA branch gets an input of its own now, with random zeros."""
        dropout: Any = self._modules["lora_dropout"]
        return self.training and dropout.p > 0

    def operand(self) -> LoraOperand:
        """This layer's part in a call of ``int4_lora_linears``."""
        own: Any = self._parameters
        return LoraOperand(self.int4(), own["bias"], own["lora_A"], own["lora_B"], self.scaling)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.lora_A.shape[0]}"


def compute_together(layers: Sequence[Int4LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of layers with one input. Nothing is computed if the layers' tapes know all of them."""
    recorded = [None if layer.tape is None else layer.tape.lookup(layer, x) for layer in layers]
    known = tuple(y for y in recorded if y is not None)
    everything = known if len(known) == len(layers) else None
    x = autocast_input(x)
    operands = [layer.operand() for layer in layers]
    return int4_lora_linears(x, operands, layers[0].backend, everything, _stacked(layers, x))


def _stacked(layers: Sequence[Int4LoRALinear], x: Tensor) -> Stacked | None:
    """The layers' adapters in x's dtype, if their block has stacked them."""
    stacks = layers[0].stacks
    return None if stacks is None else stacks.stacked(layers, x.dtype)
