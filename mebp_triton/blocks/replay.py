"""How a recompute sees what the forward pass saw.

There are two kinds of it. ``ForwardState`` is what PyTorch keeps outside of the model: autocast and the random
generators. ``Recording`` and ``Replay`` are tapes (see ``layers.linear.Tape``): outputs of layers that were kept in the
forward pass, by call, so that the recompute can use them instead of computing them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mebp_triton.layers.linear import Int4LoRALinear
from mebp_triton.layers.lora_function import autocast_input
from mebp_triton.store.block_inputs import BlockInput, BlockInputStore
from mebp_triton.system.errors import InPlaceChange
from mebp_triton.system.random_state import RandomState


class ForwardState:
    """The state outside of the model that a forward pass depends on.

    Args:
        device: where the forward pass runs.
        random: whether it may draw random numbers, so that the generators belong to it.
    """

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
        """While active, the state is that of the forward pass; afterwards it is what it was before."""
        random = self.random.replayed() if self.random is not None else nullcontext()
        with random, torch.autocast(**self.autocast):
            yield


class OpaqueModule(nn.Module):
    """A module that counts as one layer in its block's recompute, and recomputes the layers inside by itself.

    Its output has the shape of its input.

    Attributes:
        draws: whether it may draw random numbers while training, so that its recompute has to draw the same.
    """

    tape: Recording | Replay | None = None
    draws = True


Recorded = Int4LoRALinear | OpaqueModule


class Recording:
    """A tape that keeps the outputs of a block's adapted layers during its forward pass.

    Attributes:
        kept: the outputs of each layer, in the order of its calls.
        parts: the recordings of what each opaque module computes piece by piece.
        unused: a layer whose output no gradient needs, so that it is not kept.
    """

    def __init__(self, store: BlockInputStore) -> None:
        self.store = store
        self.kept: dict[Recorded, list[BlockInput]] = defaultdict(list)
        self.parts: dict[OpaqueModule, list[Recording]] = defaultdict(list)
        self.unused: Recorded | None = None

    def lookup(self, layer: Recorded, x: Tensor) -> Tensor | None:
        return None

    def record(self, layer: Recorded, y: Tensor) -> None:
        if layer is not self.unused:
            self.kept[layer].append(self.store.save(y))

    def part(self, module: OpaqueModule) -> Recording:
        """A new recording, for the next piece of what ``module`` computes."""
        self.parts[module].append(Recording(self.store))
        return self.parts[module][-1]


class Replay:
    """A tape that answers each call with the output that was kept of it, and calls of ``unused`` with NaN.

    NaN, so that a gradient which depends on that output after all cannot go unnoticed.
    """

    def __init__(self, recording: Recording | None, unused: Recorded | None) -> None:
        self.kept = {} if recording is None else recording.kept
        self.parts = {} if recording is None else recording.parts
        self.unused = unused
        self.calls: Counter[Recorded] = Counter()
        self.pieces: Counter[OpaqueModule] = Counter()

    def lookup(self, layer: Recorded, x: Tensor) -> Tensor | None:
        if layer is self.unused:
            width = x.shape[-1] if isinstance(layer, OpaqueModule) else layer.out_features
            return autocast_input(x).new_full((*x.shape[:-1], width), float("nan"))
        kept, call = self.kept.get(layer, []), self.calls[layer]
        if call >= len(kept):
            return None
        try:
            # A tensor object of its own: it becomes the output of an autograd function, which sets its grad_fn.
            return kept[call].load().detach()
        except InPlaceChange:
            return None  # the block changed this output in place, so what was kept is no longer the layer's output

    def record(self, layer: Recorded, y: Tensor) -> None:
        if self.kept:
            self.calls[layer] += 1

    def part(self, module: OpaqueModule) -> Recording | None:
        """The recording of the next piece of what ``module`` computes; None if there is none."""
        parts, piece = self.parts.get(module, []), self.pieces[module]
        self.pieces[module] += 1
        return parts[piece] if piece < len(parts) else None
