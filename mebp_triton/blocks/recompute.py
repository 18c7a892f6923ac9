"""Recomputing a block without the outputs of its adapted layers that were kept, or that no gradient needs.

A recompute makes what the gradients need. If the outputs of the linear layers were kept in the forward pass, it
computes no matrix product. And if only additions follow the block's last linear layer, no gradient needs that layer's
output, so its product is left out in any case. An MLP that runs by chunks (see ``mlp_chunks``) counts as one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mebp_triton.layers.linear import Int4LoRALinear

from .replay import Recorded, Recording, Replay


def _recorded_in(module: nn.Module) -> Iterator[Recorded]:
    for child in module.children():
        if isinstance(child, Recorded):
            yield child
        else:
            yield from _recorded_in(child)


class Recompute:
    """Runs one block (or one ``OpaqueModule``), and recomputes it, in every step.

    The first recompute finds out which layer is the last one. From then on that layer's output is NaN instead of
    computed, as long as nothing after it is saved for the backward pass: an operation whose gradient depends on a value
    saves that value. If something is saved (by a norm or an activation after the layer, or as a dropout mask), this
    recompute is done once more in full, and so is every later one. Only an autograd function that keeps a value by
    other means than ``save_for_backward`` is not seen: its gradient would be NaN.

    Attributes:
        layers: the layers that are recorded.
        last: the layer whose output is left out; None if there is none, or none is known yet.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = list(dict.fromkeys(_recorded_in(module)))
        adapted = [layer for layer in module.modules() if isinstance(layer, Int4LoRALinear)]
        self.shared_inputs = {layer.shared_input for layer in adapted if layer.shared_input is not None}
        self.last: Recorded | None = None
        self.settled = False

    def call(self, forward: Callable[[], Any]) -> Any:
        """Returns ``forward()``, the module's own forward pass; afterwards no layer keeps an output for another."""
        try:
            return forward()
        finally:
            for shared in self.shared_inputs:
                shared.forget()

    @contextmanager
    def recorded(self, recording: Recording) -> Iterator[None]:
        """While active, the outputs of the layers are kept in ``recording``."""
        recording.unused = self.last
        with self.taped(recording):
            yield

    def run(self, recompute: Callable[[], Any], recording: Recording | None) -> Any:
        """Returns what ``recompute`` returns. Gradients through it are right, but its value may be NaN.

        Args:
            recompute: runs the module's forward pass with a graph; it may be called twice.
            recording: made in the forward pass that is recomputed.
        """
        if not self.settled:
            return self._find_last(recompute, recording)
        if self.last is not None:
            output, needed = self._run_without(self.last, recompute, recording)
            if not needed:
                return output
            self.last = output = None  # frees the graph before another one is made
        with self.taped(Replay(recording, None)):
            return recompute()

    def _run_without(
        self, unused: Recorded, recompute: Callable[[], Any], recording: Recording | None
    ) -> tuple[Any, bool]:
        """The output of a recompute in which ``unused`` gives NaN, and whether a gradient may depend on that."""
        saved: list[torch.Size] = []
        entered: list[torch.autograd.graph.saved_tensors_hooks] = []

        def watch(*_: Any) -> None:
            # From here on, that is, after the layer has returned, the hook sees every tensor that autograd saves. What
            # it returns instead of the tensor does not matter: a graph that has saved something is not used. The watch
            # ends with the recompute, outside of this function, so it cannot be a with statement.
            entered.append(torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape), lambda x: x))
            entered[-1].__enter__()

        hook = unused.register_forward_hook(watch)
        try:
            with self.taped(Replay(recording, unused)):
                output = recompute()
        finally:
            hook.remove()
            for context in reversed(entered):
                context.__exit__(None, None, None)
        return output, bool(saved)

    @contextmanager
    def taped(self, tape: Recording | Replay) -> Iterator[None]:
        """While active, ``tape`` is the tape of the layers."""
        for layer in self.layers:
            vars(layer)["tape"] = tape  # as an attribute: ``Module.__setattr__`` would look through the parameters
        try:
            yield
        finally:
            for layer in self.layers:
                vars(layer)["tape"] = None

    def _find_last(self, recompute: Callable[[], Any], recording: Recording | None) -> Any:
        """Recomputes in full, and sees which layer is called last."""
        called: list[Recorded] = []
        hooks = [layer.register_forward_hook(lambda module, *_: called.append(module)) for layer in self.layers]
        try:
            with self.taped(Replay(recording, None)):
                output = recompute()
        finally:
            for hook in hooks:
                hook.remove()
        self.settled = True
        if called and called.count(called[-1]) == 1:
            self.last = called[-1]
        return output
