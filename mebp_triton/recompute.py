"""What a block's recompute leaves out: outputs of its adapted layers that were kept, or that no gradient needs.

A recompute makes what the gradients need. Where the outputs of the linear layers were kept in the forward pass, it has
no matrix products. And no gradient needs the output of the block's last linear layer where only additions follow it:
that product is left out in any case. An MLP that runs by chunks (see ``token_chunks``) counts as one layer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .lora import Int4LoRALinear, autocast_input
from .stores.checkpoints import Checkpoint, CheckpointStore, InPlaceChange

Granularity = Literal["full", "selective"]
GRANULARITIES: tuple[Granularity, ...] = ("full", "selective")


class RandomState:
    """The generators' states, so that a recompute draws the same dropout masks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def changed(self) -> bool:
        """Whether anything was drawn since."""
        now = RandomState(self.device)
        same = torch.equal(now.cpu, self.cpu)
        if self.cuda is not None and now.cuda is not None:
            same = same and torch.equal(now.cuda, self.cuda)
        return not same

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self.device] if self.cuda is not None else []):
            self.put_back()
            yield


class Surroundings:
    """What a forward pass depends on beside its arguments: autocast, and with ``random`` the generators."""

    def __init__(self, device: torch.device, random: bool) -> None:
        kind = device.type
        self.random = RandomState(device) if random else None
        self.autocast: dict[str, Any] = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }

    @contextmanager
    def replayed(self) -> Iterator[None]:
        random = self.random.replayed() if self.random is not None else nullcontext()
        with random, torch.autocast(**self.autocast):
            yield


class Unit(nn.Module):
    """A module that counts as one layer in its block's recompute, and looks after the layers inside by itself.

    Its output has its input's shape.
    """

    tape: Recording | Replay | None = None


Producer = Int4LoRALinear | Unit


class Recording:
    """Keeps the outputs of a block's adapted layers during its forward pass, call by call."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self.kept: dict[Producer, list[Checkpoint]] = defaultdict(list)
        self.parts: dict[Unit, list[Recording]] = defaultdict(list)
        self.unused: Producer | None = None

    def known(self, layer: Producer, x: Tensor) -> Tensor | None:
        return None

    def passed(self, layer: Producer, y: Tensor) -> None:
        if layer is not self.unused:
            self.kept[layer].append(self.store.save(y))

    def part(self, unit: Unit) -> Recording:
        """For the next piece of what ``unit`` computes."""
        self.parts[unit].append(Recording(self.store))
        return self.parts[unit][-1]


class Replay:
    """Gives each call the output that was kept of it; NaN for that of the layer ``unused``."""

    def __init__(self, recording: Recording | None, unused: Producer | None) -> None:
        self.kept = {} if recording is None else recording.kept
        self.parts = {} if recording is None else recording.parts
        self.unused = unused
        self.calls: Counter[Producer] = Counter()
        self.parts_given: Counter[Unit] = Counter()

    def known(self, layer: Producer, x: Tensor) -> Tensor | None:
        if layer is self.unused:
            width = x.shape[-1] if isinstance(layer, Unit) else layer.out_features
            return autocast_input(x).new_full((*x.shape[:-1], width), float("nan"))
        kept, call = self.kept.get(layer, []), self.calls[layer]
        if call >= len(kept):
            return None
        try:
            # A tensor of its own, since it becomes the output of an autograd function.
            return kept[call].load().detach()
        except InPlaceChange:
            return None  # the block changes that output in place, so it is computed again

    def passed(self, layer: Producer, y: Tensor) -> None:
        self.calls[layer] += 1

    def part(self, unit: Unit) -> Recording | None:
        """What was kept of the next piece of what ``unit`` computes."""
        parts, place = self.parts.get(unit, []), self.parts_given[unit]
        self.parts_given[unit] += 1
        return parts[place] if place < len(parts) else None


def _producers(module: nn.Module) -> Iterator[Producer]:
    for child in module.children():
        if isinstance(child, Producer):
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
        self.last: Producer | None = None
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
        called: list[Producer] = []
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
