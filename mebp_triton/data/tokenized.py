"""Rows of tokens in two flat arrays, in memory or in a scratch file, and a report of what became of a file."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mebp_triton.system.scratch import ScratchArray

IGNORE_INDEX = -100
CHECKSUM_CHUNK = 1 << 20  # elements


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        input_ids: ``[T]`` int64.
        labels: ``[T]``, the ids again (the model shifts them), and -100 where nothing is trained.
        position_ids: ``[T]`` for a packed row, where they start again at 0 with each document; otherwise None.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None


@dataclass(frozen=True)
class DataReport:
    """What became of a file.

    Attributes:
        rows: rows that were kept.
        tokens: tokens in them.
        trained_tokens: tokens that enter the loss: trained, and not the first of a row, which nothing predicts.
        truncated_rows: kept rows that were cut at the maximum length.
        dropped_rows: rows that were left out because none of their tokens would enter the loss.
        masked_tokens: kept tokens that a mask keeps out of the loss: prompts, and turns that are not the assistant's.
        truncated_tokens: tokens that were cut off the truncated rows.
        converted_rows: kept rows that came as ShareGPT conversations or Alpaca instructions.
        packed_rows: rows that the kept rows were packed into; 0 without packing.
        packed_length: the most tokens that a packed row may have.
    """

    rows: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    dropped_rows: int
    masked_tokens: int = 0
    truncated_tokens: int = 0
    converted_rows: int = 0
    packed_rows: int = 0
    packed_length: int = 0

    def describe(self) -> str:
        """The report in one line."""
        parts = [
            f"{self.rows:,} rows, {self.tokens:,} tokens ({self.trained_tokens:,} trained, "
            f"{self.masked_tokens:,} masked)",
            f"{self.truncated_rows:,} rows truncated ({self.truncated_tokens:,} tokens cut off)",
            f"{self.dropped_rows:,} dropped",
        ]
        if self.converted_rows:
            parts.append(f"{self.converted_rows:,} converted to chat messages or prompts")
        if self.packed_rows:
            filled = self.tokens / (self.packed_rows * self.packed_length)
            parts.append(f"packed into {self.packed_rows:,} rows of {self.packed_length:,}, {filled:.1%} filled")
        return ", ".join(parts)


class TokenizedData:
    """Rows in two flat arrays, at 5 bytes a token: lists of Python integers would take 8 to 36.

    Row ``i`` is ``ids[offsets[i] : offsets[i + 1]]``; ``trained`` says which of the ids are trained. Arrays in a file
    are read row by row; only ``offsets``, 8 bytes a row, is in memory then.
    """

    def __init__(
        self,
        ids: NDArray[np.int32] | ScratchArray,
        trained: NDArray[np.bool_] | ScratchArray,
        offsets: NDArray[np.int64],
        report: DataReport,
    ):
        self.ids, self.trained, self.offsets, self.report = ids, trained, offsets, report

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.row(index)

    def row(self, index: int) -> Example:
        """A row of the file, also where ``self[index]`` is a packed row of several."""
        place = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        input_ids = torch.from_numpy(self.ids[place].astype(np.int64))
        return Example(input_ids, input_ids.masked_fill(torch.from_numpy(~self.trained[place]), IGNORE_INDEX))

    def highest_id(self) -> int:
        """The largest id of any row."""
        steps = range(0, len(self.ids), CHECKSUM_CHUNK)
        return max((int(self.ids[start : start + CHECKSUM_CHUNK].max()) for start in steps), default=0)

    def checksum(self) -> int:
        """CRC-32 of all rows and masks, by which a resumed run recognises its data."""
        checksum = 0
        for flat in (self.ids, self.trained, self.offsets):
            for start in range(0, len(flat), CHECKSUM_CHUNK):
                checksum = zlib.crc32(flat[start : start + CHECKSUM_CHUNK].data, checksum)
        return checksum


class RowWriter:
    """Collects rows in growing flat arrays, and counts what is cut or left out.

    Args:
        max_length: tokens; longer rows are cut.
        scratch: a directory for a temporary file that takes the arrays; None keeps them in memory.
    """

    def __init__(self, max_length: int, scratch: Path | None = None):
        self.max_length = max_length
        self.ids: array[int] | ScratchArray = array("i") if scratch is None else ScratchArray(scratch, np.int32)
        self.trained: bytearray | ScratchArray = bytearray() if scratch is None else ScratchArray(scratch, np.bool_)
        self.offsets = array("q", [0])
        self.trained_tokens = self.masked = self.truncated = self.cut_off = self.dropped = self.converted = 0

    def add(self, ids: Sequence[int], trained: bytes, converted: bool = False) -> None:
        """Adds a row; ``trained`` has a 1 for every token to train, else a 0."""
        assert len(ids) == len(trained)
        length = min(len(ids), self.max_length)
        entering = trained.count(1, 1, length)
        if entering == 0:
            self.dropped += 1
            return
        self.truncated += length < len(ids)
        self.cut_off += len(ids) - length
        self.trained_tokens += entering
        self.masked += trained.count(0, 0, length)
        self.converted += converted
        try:
            self.ids.extend(array("i", ids[:length]))
        except OverflowError:
            raise ValueError(f"the tokenizer gives the id {max(ids)}, which no model has") from None
        self.trained.extend(trained[:length])
        self.offsets.append(self.offsets[-1] + length)

    def finish(self) -> TokenizedData:
        """Returns the rows, without copying them."""
        offsets = np.frombuffer(self.offsets, np.int64)
        report = DataReport(
            rows=len(offsets) - 1,
            tokens=int(offsets[-1]),
            trained_tokens=self.trained_tokens,
            truncated_rows=self.truncated,
            dropped_rows=self.dropped,
            masked_tokens=self.masked,
            truncated_tokens=self.cut_off,
            converted_rows=self.converted,
        )
        ids = self.ids if isinstance(self.ids, ScratchArray) else np.frombuffer(self.ids, np.int32)
        trained = self.trained if isinstance(self.trained, ScratchArray) else np.frombuffer(self.trained, np.bool_)
        return TokenizedData(ids, trained, offsets, report)
