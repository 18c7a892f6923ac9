"""Layers with one input, such as q, k and v, or gate and up, computed together: one launch, and one dX.

Which layers these are is found when a model is loaded, by running its modelling code on the meta device. The first of
them then computes the outputs of all, and the others hand theirs out. Whoever is called with anything else, or in
another order, is computed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .linear import Int4LoRALinear, compute_together


class SharedInput:
    """Adapted layers that read one input, in the order in which they are called."""

    def __init__(self, layers: Sequence[Int4LoRALinear]) -> None:
        self.layers = tuple(layers)
        self._input: Tensor | None = None
        self._state: Any = None
        self._waiting: dict[Int4LoRALinear, Tensor] = {}

    def output_of(self, layer: Int4LoRALinear, x: Tensor) -> Tensor:
        """``layer``'s output for ``x``."""
        if self._waiting and self._input is x and not x.is_inference() and self._state == self._now(x):
            ready = self._waiting.pop(layer, None)
            if not self._waiting:
                self.forget()
            if ready is not None:
                return ready
        self.forget()
        alone = layer is not self.layers[0] or torch.compiler.is_compiling() or self._drops_out()
        if alone or any(tensor.is_inference() for tensor in self._read(x)):
            return compute_together([layer], x)[0]
        outputs = compute_together(self.layers, x)
        self._waiting = dict(zip(self.layers[1:], outputs[1:], strict=True))
        self._input, self._state = x, self._now(x)
        return outputs[0]

    def forget(self) -> None:
        """Lets go of outputs that nobody asked for."""
        self._input, self._state, self._waiting = None, None, {}

    def _drops_out(self) -> bool:
        return any(member.training and member.lora_dropout.p > 0 for member in self.layers)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model has the layers, and no outputs that wait."""
        return vars(self) | {"_input": None, "_state": None, "_waiting": {}}

    def _read(self, x: Tensor) -> list[Tensor]:
        """Every tensor that the outputs depend on."""
        tensors = [x]
        for member in self.layers:
            own = (member.lora_A, member.lora_B, member.weight, member.bias, *member._buffers.values())
            tensors += [tensor for tensor in own if tensor is not None]
        return tensors

    def _now(self, x: Tensor) -> Any:
        """What must be the same for an output to be still what a call would give (``.data`` is written unseen)."""
        autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        return (
            [(id(tensor), tensor._version) for tensor in self._read(x)],
            [member.scaling for member in self.layers],
            torch.is_grad_enabled(),
            autocast,
        )
