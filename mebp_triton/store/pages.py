"""Weights brought in while a block runs, and dropped after it.

Where they lie: ``device`` in the device's memory throughout; ``host`` in the host's; ``file`` in the store's files.

On a CPU weights in files are views of the mapping: entering makes a block's pages resident in one call, leaving gives
them back, and the next block's are read ahead into the system's cache meanwhile. A device that is not the CPU gets a
block's bytes by one read and one copy into an arena; with two arenas, a thread, and a stream of its own, the next
block's read and copy run while this one computes.
"""

from __future__ import annotations

from .reader import StoreFile
from .waiting import Waiting


class Pages:
    """Weights that always lie in place. Others are there within: ``with pages: ...``."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def prefetch(self) -> None:
        """They will be needed next. Returns at once."""


class MappedPages(Pages):
    """Weights that are views of a mapped file."""

    def __init__(self, file: StoreFile, waiting: Waiting) -> None:
        self.file, self.waiting = file, waiting
        self.depth = 0

    def __enter__(self) -> None:
        if self.depth == 0:
            with self.waiting.counted():
                self.file.verify()
                self.file.mapped.populate()
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.file.mapped.drop()

    def prefetch(self) -> None:
        self.file.mapped.read_ahead()
