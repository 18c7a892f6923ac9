"""The experts of a mixture in a block's file: each one's bytes, brought in when a pass needs it.

A block's pages hold the rest of its file. When a block has run so far that its router has chosen, the experts module
asks its source for those experts. They stay until the block's pages are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mebp_triton.kernels.layout import Int4Weight

from .reader import Store, StoreFile
from .waiting import Waiting

Span = tuple[int, int]  # where bytes of a file's data section begin and end


class ExpertHolder(Protocol):
    """A module that computes with the weights of experts."""

    source: Any


@dataclass(frozen=True)
class ExpertPlaces:
    """The experts of one module: the module, and the names of each expert's matrices in the store."""

    holder: ExpertHolder
    names: Sequence[tuple[str, str]]


class StoredExperts:
    """The experts of one module, as views of a store's mapped file or of a copy of its data section.

    Args:
        store: the store.
        names: the names of each expert's two matrices.
        data: the copy; None for the mapped file.
    """

    def __init__(self, store: Store, names: Sequence[tuple[str, str]], data: Tensor | None = None) -> None:
        self.store, self.names, self.data = store, names, data
        # Made once: to make a weight takes the host longer than to launch its product.
        self._made: dict[int, tuple[Int4Weight, Int4Weight]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredExperts:
        return self  # nothing writes to it, so copies of a model share it

    def bring(self, experts: Sequence[int]) -> list[tuple[Int4Weight, Int4Weight]]:
        """Returns the weights of these experts, which are in place already."""
        new = [expert for expert in experts if expert not in self._made]
        self._made.update(zip(new, views_of(self.store, self.names, new, self.data), strict=True))
        return [self._made[expert] for expert in experts]


def views_of(
    store: Store, names: Sequence[tuple[str, str]], experts: Iterable[int], data: Tensor | None
) -> list[tuple[Int4Weight, Int4Weight]]:
    """The weights of ``experts`` as views of ``data``, a copy of the data section, or of the mapped file for None."""
    return [(store.weight(names[one][0], data), store.weight(names[one][1], data)) for one in experts]


class MappedExperts:
    """The experts of one module in a mapped file: made resident when they are asked for.

    Attributes:
        here: the experts that are resident.
        last: those of the last pass, which the next one may well need again: a recompute needs just these.
    """

    def __init__(self, store: Store, file: StoreFile, names: Sequence[tuple[str, str]], waiting: Waiting) -> None:
        self.store, self.file, self.names, self.waiting = store, file, names, waiting
        self.tensors = [tensors_of(store, pair) for pair in names]
        self.spans = [spans_of(file, tensors) for tensors in self.tensors]
        self.here: set[int] = set()
        self.last: set[int] = set()

    def bring(self, experts: Sequence[int]) -> list[tuple[Int4Weight, Int4Weight]]:
        """Makes the experts resident, verified, and returns their weights."""
        new = [expert for expert in experts if expert not in self.here]
        with self.waiting.counted():
            for expert in new:
                self.file.verify(self.tensors[expert])
                for begin, end in self.spans[expert]:
                    self.file.mapped.populate(self.file.start + begin, self.file.start + end)
        self.waiting.count_experts(self.spans, new)
        self.here.update(new)
        return views_of(self.store, self.names, experts, None)

    def leave(self) -> None:
        """Takes note that the block was left, and its pages were dropped."""
        self.last, self.here = self.here, set()

    def read_ahead(self) -> None:
        """Asks the system to have the experts of the last pass in its cache soon."""
        for expert in self.last:
            for begin, end in self.spans[expert]:
                self.file.mapped.read_ahead(self.file.start + begin, self.file.start + end)


def tensors_of(store: Store, matrices: Iterable[str]) -> list[str]:
    """The names of the tensors of these matrices in their file."""
    return [f"{name}.{part}" for name in matrices for part in store.matrices[name].tensors()]


def spans_of(file: StoreFile, tensors: Iterable[str]) -> list[Span]:
    """The bytes of these tensors in the data section: of those that lie side by side, one span."""
    spans: list[Span] = []
    for begin, end in sorted(file.entries[name][2:] for name in tensors):
        if spans and spans[-1][1] == begin:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((begin, end))
    return spans


def others_in(file: StoreFile, tensors: Iterable[str]) -> list[str]:
    """The names of the file's tensors that are none of these."""
    those = set(tensors)
    return [name for name in file.entries if name not in those]
