"""What a block's recompute is given back: outputs that were kept, autocast, random numbers."""

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


class OpaqueModule(nn.Module):
    """A module that counts as one layer in its block's recompute, and looks after the layers inside by itself.

    Its output has its input's shape.
    """

    tape: Recording | Replay | None = None


Recorded = Int4LoRALinear | OpaqueModule


class Recording:
    """Keeps the outputs of a block's adapted layers during its forward pass, call by call."""

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

    def part(self, unit: OpaqueModule) -> Recording:
        """For the next piece of what ``unit`` computes."""
        self.parts[unit].append(Recording(self.store))
        return self.parts[unit][-1]


class Replay:
    """Gives each call the output that was kept of it; NaN for that of the layer ``unused``."""

    def __init__(self, recording: Recording | None, unused: Recorded | None) -> None:
        self.kept = {} if recording is None else recording.kept
        self.parts = {} if recording is None else recording.parts
        self.unused = unused
        self.calls: Counter[Recorded] = Counter()
        self.parts_given: Counter[OpaqueModule] = Counter()

    def lookup(self, layer: Recorded, x: Tensor) -> Tensor | None:
        if layer is self.unused:
            width = x.shape[-1] if isinstance(layer, OpaqueModule) else layer.out_features
            return autocast_input(x).new_full((*x.shape[:-1], width), float("nan"))
        kept, call = self.kept.get(layer, []), self.calls[layer]
        if call >= len(kept):
            return None
        try:
            # A tensor of its own, since it becomes the output of an autograd function.
            return kept[call].load().detach()
        except InPlaceChange:
            return None  # the block changes that output in place, so it is computed again

    def record(self, layer: Recorded, y: Tensor) -> None:
        self.calls[layer] += 1

    def part(self, unit: OpaqueModule) -> Recording | None:
        """What was kept of the next piece of what ``unit`` computes."""
        parts, place = self.parts.get(unit, []), self.parts_given[unit]
        self.parts_given[unit] += 1
        return parts[place] if place < len(parts) else None
