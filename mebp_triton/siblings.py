"""Layers with one input, such as q, k and v, or gate and up, computed together: one launch, and one dX.

Which layers these are is found when a model is loaded, by running its modelling code on the meta device. The first of
them then computes the outputs of all, and the others hand theirs out. Whoever is called with anything else, or in
another order, is computed alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.configs import MOST_MEMBERS
from .lora import Int4LoRALinear, compute_together
from .skeleton import Int4Site, int4_sites, meta_model, run_on_meta


class Siblings:
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


def shared_inputs(config: Any) -> list[list[Int4Site]]:
    """The decoder's linear layers by what they read: those of one parent with one input together, in order of calls.

    Found by running the model of ``config`` on the meta device: no names, no numbers.

    Raises:
        ValueError: the model cannot be run like that.
    """
    model = meta_model(config)
    groups: dict[tuple[int, str], list[Int4Site]] = {}
    inputs = []  # kept, so that no two have the same id

    def watch(site: Int4Site) -> None:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs.append(arguments[0])
            groups.setdefault((id(arguments[0]), site.name.rpartition(".")[0]), []).append(site)

        model.get_submodule(site.name).register_forward_pre_hook(hook)

    for site in int4_sites(model)[0]:
        if site.role == "linear":
            watch(site)
    run_on_meta(model)
    return list(groups.values())


def join_siblings(model: nn.Module, config: Any) -> None:
    """Lets the adapted layers of ``model`` that read one input be computed together."""
    try:
        groups = shared_inputs(config)
    except ValueError as error:
        warnings.warn(f"{error}; layers that share an input are computed one by one", stacklevel=3)
        return
    for sites in groups:
        modules = [model.get_submodule(site.name) for site in sites]
        layers = [module for module in modules if isinstance(module, Int4LoRALinear)]
        if 1 < len(layers) <= MOST_MEMBERS and len(set(layers)) == len(layers):
            siblings = Siblings(layers)
            for layer in layers:
                layer.siblings = siblings
