"""Layers with one input, such as q, k and v, or gate and up, computed together: one launch, and one dX.

Which layers share an input is found when a model is loaded, by running its modelling code on the meta device
(``models.discover``). The first of them then computes the outputs of all, and each of the others returns the one that
waits for it. The modelling code is not changed and may do anything between the calls, so an output that waits is used
only if computing it now would give the same. In every other case a layer is computed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .linear import Int4LoRALinear, compute_together


class SharedInput:
    """Adapted layers that read one input.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: Sequence[Int4LoRALinear]) -> None:
        self.layers = tuple(layers)
        self._input: Tensor | None = None
        self._surroundings: Any = None
        self._waiting: dict[Int4LoRALinear, tuple[Tensor, Any]] = {}

    def output_of(self, layer: Int4LoRALinear, x: Tensor) -> Tensor:
        """The output ``[..., N]`` of ``layer`` for ``x`` ``[..., K]``."""
        # "is", since an equal tensor elsewhere may belong to another graph.
        if self._input is x and self._surroundings == _surroundings(x):
            ready, state = self._waiting.pop(layer, (None, None))
            if not self._waiting:
                self.forget()
            if ready is not None and state == _state(layer):
                return ready
        self.forget()
        # A layer out of turn does not know who will be called next; dropout gives each layer an input of its own; and
        # a compiler would have to trace what waits here.
        alone = (
            layer is not self.layers[0]
            or torch.compiler.is_compiling()
            or any(member.drops_out() for member in self.layers)
        )
        if alone or x.is_inference():
            return compute_together([layer], x)[0]
        others = self.layers[1:]
        states = list(map(_state, others))
        if None in states or _state(layer) is None:
            return compute_together([layer], x)[0]
        outputs = compute_together(self.layers, x)
        self._waiting = dict(zip(others, zip(outputs[1:], states, strict=True), strict=True))
        self._input, self._surroundings = x, _surroundings(x)
        return outputs[0]

    def forget(self) -> None:
        """Drops outputs that were computed and not asked for."""
        self._input, self._surroundings, self._waiting = None, None, {}

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of the model: the layers, but no outputs that wait."""
        return vars(self) | {"_input": None, "_surroundings": None, "_waiting": {}}


def _surroundings(x: Tensor) -> Any:
    """What the outputs of all layers depend on beside the layers, as a value to compare."""
    kind = x.device.type
    return x._version, torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _state(layer: Int4LoRALinear) -> Any:
    """What the output of a layer depends on beside its surroundings, as a value to compare; None if it has no such.

    Tensors are compared by identity and version, which writing to ``.data`` does not change.
    """
    state: list[Any] = [layer.scaling]
    for tensor in (*layer._parameters.values(), *layer._buffers.values()):
        if tensor is not None:
            # Inference tensors do not count their changes, so one in between would not be seen.
            if tensor.is_inference():
                return None
            state += id(tensor), tensor._version
    return state


def layers_by_input(module: nn.Module) -> list[tuple[Int4LoRALinear, ...]]:
    """The adapted layers of ``module``, those that are computed together as one group."""
    layers = list(dict.fromkeys(layer for layer in module.modules() if isinstance(layer, Int4LoRALinear)))
    groups: dict[tuple[Int4LoRALinear, ...], None] = {}
    for layer in layers:
        shared = layer.shared_input
        whole = isinstance(shared, SharedInput) and all(member in layers for member in shared.layers)
        groups[shared.layers if whole and isinstance(shared, SharedInput) else (layer,)] = None
    return list(groups)
