"""Weights that are brought in while a block runs, and dropped after it.

On a CPU, weights in files are views of a mapping: entering makes a block's pages resident in one call, leaving gives
them back, and meanwhile the system reads the next block's pages into its cache. ``arena`` does it for other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mebp_triton.kernels.layout import Int4Weight

from .experts import MappedExperts, others_in, spans_of
from .reader import StoreFile
from .waiting import Waiting


class WeightHolder(Protocol):
    """A module that computes with an int4 weight."""

    def set_int4(self, weight: Int4Weight) -> None: ...


class Pages:
    """A block's weights, in place while active: ``with pages: ...``. These always are."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def prefetch(self) -> None:
        """Says that these weights are needed next. Returns at once."""


class MappedPages(Pages):
    """A block's weights as views of a mapped file, resident while active.

    ``experts`` bring their own bytes in, while the block runs.
    """

    def __init__(self, file: StoreFile, waiting: Waiting, experts: Sequence[MappedExperts] = ()) -> None:
        self.file, self.waiting, self.experts = file, waiting, experts
        self.depth = 0
        # Beside experts, the others; else the whole file.
        self._tensors: list[str] | None = None
        self._spans, self._bytes = [(0, file.mapped.size)], file.mapped.size
        if experts:
            of_experts = [name for source in experts for tensors in source.tensors for name in tensors]
            self._tensors = others_in(file, of_experts)
            self._spans = [(file.start + begin, file.start + end) for begin, end in spans_of(file, self._tensors)]
            self._bytes = sum(end - begin for begin, end in self._spans)

    def __enter__(self) -> None:
        if self.depth == 0:
            with self.waiting.counted():
                self.file.verify(self._tensors)
                for span in self._spans:
                    self.file.mapped.populate(*span)
            self.waiting.paged += self._bytes
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.file.mapped.drop()
            for source in self.experts:
                source.leave()

    def prefetch(self) -> None:
        for span in self._spans:
            self.file.mapped.read_ahead(*span)
        for source in self.experts:
            source.read_ahead()
