"""Stands for what a traced model has elsewhere: block inputs that wait, and the experts of mixtures."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mebp_triton.store.block_inputs import BlockInput, BlockInputStore
from mebp_triton.store.experts import ExpertPlaces


class Counted:
    """A block input store that counts the bytes that wait in it.

    Attributes:
        bytes: what waits now.
        saved: the bytes of every tensor that was saved, in order.
    """

    def __init__(self, store: BlockInputStore) -> None:
        self.store, self.bytes = store, 0
        self.saved: list[int] = []

    def save(self, tensor: Tensor) -> BlockInput:
        block_input = self.store.save(tensor)
        self.saved.append(tensor.nbytes)
        self.bytes += tensor.nbytes
        weakref.finalize(block_input, self._gone, tensor.nbytes)
        return block_input

    def _gone(self, size: int) -> None:
        self.bytes -= size


class Elsewhere:
    """Stands for block inputs in files, which take no memory. It allocates what ``FileBlockInputs`` does."""

    def save(self, tensor: Tensor) -> BlockInput:
        tensor.detach().contiguous()
        return _Away(tensor.shape, tensor.dtype)


@dataclass(eq=False)
class _Away:
    shape: torch.Size
    dtype: torch.dtype

    def load(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


class AnyExperts:
    """The experts of a module while it is traced: all have the same shapes, and the same two weights.

    Which experts tokens are routed to is in the data, so their rows are spread evenly.

    Attributes:
        count: the number of experts.
        pairs: how many pairs of token and expert the largest pass had.
    """

    def __init__(self, places: ExpertPlaces, store: Any) -> None:
        self.weights = [store.weight(name) for name in places.names[0]]
        self.count, self.pairs = len(places.names), 0
        holder: Any = places.holder
        holder.source, holder.count = self, self.spread

    def bring(self, experts: Sequence[int]) -> list[Any]:
        """Returns the two weights for each of these experts."""
        return [tuple(self.weights)] * len(experts)

    def spread(self, ids: Tensor) -> list[int]:
        """How many of the rows ``ids`` each expert has."""
        pairs = ids.numel()
        self.pairs = max(self.pairs, pairs)
        return [pairs // self.count + (expert < pairs % self.count) for expert in range(self.count)]
