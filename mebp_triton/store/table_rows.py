"""The rows of the embedding and the head, used where they lie: gathered one by one, or walked in segments.

A table is larger than any block (Gemma-3's has 335 MB at 4 bits), and no step needs more than a little of it at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.layout import Int4Weight

from .arena import Stager
from .reader import Store
from .waiting import Waiting

SEGMENT_BYTES = 8 << 20  # packed bytes of a segment
SEGMENT_STEP = 1024  # a segment's rows are a multiple of it, so that no tile of the loss is cut


def segment_rows(row_bytes: int, segment_bytes: int = SEGMENT_BYTES, step: int = SEGMENT_STEP) -> int:
    """The number of rows in a segment, where a row has ``row_bytes`` packed bytes."""
    return max(segment_bytes // max(1, row_bytes) // step, 1) * step


class StoredRows:
    """The rows of a matrix of a store.

    Args:
        name: the matrix.
        device: where rows are wanted.
        stager: its thread and stream bring rows to a device other than the CPU; None on the CPU.
        host: a copy of the file's data section in host memory; without it rows come from the file.
        segment_bytes, segment_step: see ``segment_rows``.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        device: torch.device,
        stager: Stager | None,
        waiting: Waiting,
        host: Tensor | None,
        segment_bytes: int = SEGMENT_BYTES,
        segment_step: int = SEGMENT_STEP,
    ) -> None:
        self.file = store.files[store.matrices[name].file]
        self.device, self.stager, self.waiting = device, stager, waiting
        self.weight = store.weight(name, host)
        self.in_file = host is None
        rows, row_bytes = self.weight.packed.shape
        self.start = self.file.start + self.file.entries[f"{name}.packed"][2]
        self.row_bytes = row_bytes
        self.segment_bytes = segment_bytes
        step = segment_rows(row_bytes, segment_bytes, segment_step)
        self.spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredRows:
        """The rows of a copy of the model, which shares the bytes."""
        made = memo[id(self)] = copy.copy(self)
        made.stager, made.waiting = copy.deepcopy((self.stager, self.waiting), memo)
        return made

    # A compiler would read memory that a file fills as memory of a fake tensor.
    @torch.compiler.disable
    def gather(self, ids: Tensor) -> Int4Weight:
        """Returns the rows ``ids`` (any shape, flattened), on the device."""
        with self.waiting.counted():
            self._verify()
            gathered = self.weight.gather(ids.reshape(-1).to(self.weight.device))
            self._drop()
            return gathered.to(self.device)

    def segments(self) -> Iterator[tuple[int, Int4Weight]]:
        """Walks all rows in order. Yields a segment's first row, and its weight, which is valid until the next one."""
        self._verify()
        try:
            yield from self._on_cpu() if self.stager is None else self._to_device(self.stager)
        finally:
            self._drop()

    def _on_cpu(self) -> Iterator[tuple[int, Int4Weight]]:
        for place, (start, stop) in enumerate(self.spans):
            first, last = self.start + start * self.row_bytes, self.start + stop * self.row_bytes
            with self.waiting.counted():
                self.file.mapped.populate(first, last)
            if place + 1 < len(self.spans):
                self.file.mapped.read_ahead(last, last + self.segment_bytes)
            yield start, self.weight.rows(start, stop)
            self.file.mapped.drop(first, last)

    def _to_device(self, stager: Stager) -> Iterator[tuple[int, Int4Weight]]:
        """Copies segments in the stager's thread; the next one's copy runs while the caller uses this one."""
        coming = stager.thread.submit(self._upload, stager, *self.spans[0])
        for place, (start, _) in enumerate(self.spans):
            current: Future[tuple[Int4Weight, Any]] = coming
            if place + 1 < len(self.spans):
                coming = stager.thread.submit(self._upload, stager, *self.spans[place + 1])
            with self.waiting.counted():
                weight, copied = current.result()
            if stager.stream is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(copied)
                # The allocator knows these tensors as the copying stream's, and would give their memory to the next
                # segment while this stream still reads it.
                for tensor in weight.tensors().values():
                    tensor.record_stream(stream)
            yield start, weight

    def _upload(self, stager: Stager, start: int, stop: int) -> tuple[Int4Weight, Any]:
        part = self.weight.rows(start, stop)
        if stager.stream is None:
            part = part.gather(torch.arange(stop - start))
            copied = None
        else:
            with torch.cuda.device(self.device), torch.cuda.stream(stager.stream):
                part = part.to(self.device)
                copied = stager.stream.record_event()
        if self.in_file:
            self.file.mapped.drop(self.start + start * self.row_bytes, self.start + stop * self.row_bytes)
        return part, copied

    def _verify(self) -> None:
        if self.in_file:
            self.file.verify()

    def _drop(self) -> None:
        if self.in_file:
            self.file.mapped.drop()
