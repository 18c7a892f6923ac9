"""What a block's recompute leaves out: outputs of its adapted layers that were kept, or that no gradient needs.

A recompute makes what the gradients need. Where the outputs of the linear layers were kept in the forward pass, it has
no matrix products. And no gradient needs the output of the block's last linear layer where only additions follow it:
that product is left out in any case.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .lora import Int4LoRALinear, Tape, autocast_input
from .stores.checkpoints import Checkpoint, CheckpointStore, InPlaceChange

Granularity = Literal["full", "selective"]
GRANULARITIES: tuple[Granularity, ...] = ("full", "selective")


class Recording:
    """Keeps the outputs of a block's adapted layers during its forward pass, call by call."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self.kept: dict[Int4LoRALinear, list[Checkpoint]] = defaultdict(list)
        self.unused: Int4LoRALinear | None = None

    def known(self, layer: Int4LoRALinear, x: Tensor) -> Tensor | None:
        return None

    def passed(self, layer: Int4LoRALinear, y: Tensor) -> None:
        if layer is not self.unused:
            self.kept[layer].append(self.store.save(y))


class _Replay:
    """Gives each call the output that was kept of it; NaN for that of the layer ``unused``."""

    def __init__(self, recording: Recording | None, unused: Int4LoRALinear | None) -> None:
        self.kept = {} if recording is None else recording.kept
        self.unused = unused
        self.calls: Counter[Int4LoRALinear] = Counter()

    def known(self, layer: Int4LoRALinear, x: Tensor) -> Tensor | None:
        if layer is self.unused:
            return autocast_input(x).new_full((*x.shape[:-1], layer.out_features), float("nan"))
        kept, call = self.kept.get(layer, []), self.calls[layer]
        if call >= len(kept):
            return None
        try:
            # A tensor of its own, since it becomes the output of an autograd function.
            return kept[call].load().detach()
        except InPlaceChange:
            return None  # the block changes that output in place, so it is computed again

    def passed(self, layer: Int4LoRALinear, y: Tensor) -> None:
        self.calls[layer] += 1


class Recompute:
    """Recomputes one block, over and over.

    The first recompute finds out which layer comes last. From then on its output is NaN, not computed, and nothing
    after it may be saved for the backward pass: whatever has a gradient that depends on the value would be. If
    something is (a norm or an activation after it, a dropout mask), the recompute is done again in full, and for this
    block always will be.
    """

    def __init__(self, block: nn.Module) -> None:
        self.layers = [module for module in block.modules() if isinstance(module, Int4LoRALinear)]
        self.last: Int4LoRALinear | None = None
        self.settled = False

    @contextmanager
    def recorded(self, recording: Recording) -> Iterator[None]:
        """Within, the block's forward pass is recorded."""
        recording.unused = self._unused()
        with self._taped(recording):
            yield

    def run(self, recompute: Callable[[], Any], recording: Recording | None) -> Any:
        """What ``recompute`` returns; its gradients are right, its value may be NaN."""
        if not self.settled:
            return self._find(recompute, recording)
        unused = self._unused()
        if unused is None:
            with self._taped(_Replay(recording, None)):
                return recompute()
        saved: list[torch.Size] = []
        entered: list[torch.autograd.graph.saved_tensors_hooks] = []

        def note(tensor: Tensor) -> Tensor:
            saved.append(tensor.shape)
            return tensor

        def after(*_: Any) -> None:
            entered.append(torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor))
            entered[-1].__enter__()

        hook = unused.register_forward_hook(after)
        try:
            with self._taped(_Replay(recording, unused)):
                output = recompute()
        finally:
            hook.remove()
            for context in reversed(entered):
                context.__exit__(None, None, None)
        if saved or len(entered) != 1:
            self.last = None
            with self._taped(_Replay(recording, None)):
                return recompute()
        return output

    def _unused(self) -> Int4LoRALinear | None:
        """The layer whose output is left out. One with dropout is not: it runs by operations of its own."""
        last = self.last
        return None if last is None or (last.training and last.lora_dropout.p > 0) else last

    @contextmanager
    def _taped(self, tape: Tape) -> Iterator[None]:
        for layer in self.layers:
            layer.tape = tape
        try:
            yield
        finally:
            for layer in self.layers:
                layer.tape = None

    def _find(self, recompute: Callable[[], Any], recording: Recording | None) -> Any:
        called: list[Int4LoRALinear] = []
        hooks = [layer.register_forward_hook(lambda module, *_: called.append(module)) for layer in self.layers]
        try:
            with self._taped(_Replay(recording, None)):
                output = recompute()
        finally:
            for hook in hooks:
                hook.remove()
        self.settled = True
        if called and called.count(called[-1]) == 1:
            self.last = called[-1]
        return output
