"""What a block's recompute leaves out: outputs of its adapted layers that were kept, or that no gradient needs.

A recompute makes what the gradients need. Where the outputs of the linear layers were kept in the forward pass, it has
no matrix products. And no gradient needs the output of the block's last linear layer where only additions follow it:
that product is left out in any case. An MLP that runs by chunks (see ``token_chunks``) counts as one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .replay import Recorded, Recording, Replay


def _producers(module: nn.Module) -> Iterator[Recorded]:
    for child in module.children():
        if isinstance(child, Recorded):
            yield child
        else:
            yield from _producers(child)


class Recompute:
    """Recomputes one block (or one unit), over and over.

    The first recompute finds out which layer comes last. From then on its output is NaN, not computed, and nothing
    after it may be saved for the backward pass: whatever has a gradient that depends on the value would be. If
    something is (a norm or an activation after it, a dropout mask), the recompute is done again in full, and for this
    block always will be. An autograd function after it that keeps a value by itself, and not by ``save_for_backward``,
    is not seen: its gradient would be NaN.
    """

    def __init__(self, block: nn.Module) -> None:
        self.layers = list(dict.fromkeys(_producers(block)))
        self.last: Recorded | None = None
        self.settled = False

    @contextmanager
    def recorded(self, recording: Recording) -> Iterator[None]:
        """Within, the block's forward pass is recorded."""
        recording.unused = self.last
        with self.taped(recording):
            yield

    def run(self, recompute: Callable[[], Any], recording: Recording | None) -> Any:
        """What ``recompute`` returns; its gradients are right, its value may be NaN."""
        if not self.settled:
            return self._find(recompute, recording)
        unused = self.last
        if unused is None:
            with self.taped(Replay(recording, None)):
                return recompute()
        saved: list[torch.Size] = []
        entered: list[torch.autograd.graph.saved_tensors_hooks] = []

        def note(tensor: Tensor) -> Tensor:
            saved.append(tensor.shape)
            return tensor.detach()  # the tensor itself, kept by the function that made it, would never be freed

        def after(*_: Any) -> None:
            entered.append(torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor))
            entered[-1].__enter__()

        hook = unused.register_forward_hook(after)
        try:
            with self.taped(Replay(recording, unused)):
                output = recompute()
        finally:
            hook.remove()
            for context in reversed(entered):
                context.__exit__(None, None, None)
        if saved or len(entered) != 1:
            self.last = output = None
            with self.taped(Replay(recording, None)):
                return recompute()
        return output

    @contextmanager
    def taped(self, tape: Recording | Replay) -> Iterator[None]:
        """Within, the layers' calls are ``tape``'s to see."""
        for layer in self.layers:
            layer.tape = tape
        try:
            yield
        finally:
            for layer in self.layers:
                layer.tape = None

    def _find(self, recompute: Callable[[], Any], recording: Recording | None) -> Any:
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
