"""Weights that are brought in while a block runs, and dropped after it.

On a CPU, weights in files are views of a mapping: entering makes a block's pages resident in one call, leaving gives
them back, and meanwhile the system reads the next block's pages into its cache. ``arena`` does it for other devices.
"""

from __future__ import annotations

from typing import Protocol

from mebp_triton.kernels.layout import Int4Weight

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
    """A block's weights as views of a mapped file, resident while active."""

    def __init__(self, file: StoreFile, waiting: Waiting) -> None:
        self.file, self.waiting = file, waiting
        self.depth = 0

    def __enter__(self) -> None:
        if self.depth == 0:
            with self.waiting.counted():
                self.file.verify()
                self.file.mapped.populate()
            self.waiting.paged += self.file.mapped.size
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.file.mapped.drop()

    def prefetch(self) -> None:
        self.file.mapped.read_ahead()
