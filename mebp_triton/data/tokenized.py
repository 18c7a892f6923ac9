"""Rows of tokens in two flat arrays, in memory or in a scratch file, and a report of what became of a file."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mebp_triton.system.scratch import ScratchArray

IGNORE_INDEX = -100
CHECKSUM_CHUNK = 1 << 20  # elements
MOST_NAMED, MOST_KEYS = 12, 200  # keys without effect that a line names, and that are counted


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
        converted_rows: kept rows of the file that came in another project's form, or with another project's roles.
        split_conversations: conversations that became several rows, because the template rewrites earlier answers.
        split_rows: the rows that they became.
        masked_messages: messages that say of themselves, by ``weight`` or the like, that they are not trained.
        shortened_messages: messages that the chat template does not write whole.
        unopened_rows: rows in which no answer stands behind what the chat template writes where one is wanted.
        unused_keys: how often each key of a row or a message had no effect.
        chat_rows: rows that the chat template wrote.
        string_rows: rows of strings, which the end-of-sequence token closes. Windows of a text are neither.
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
    split_conversations: int = 0
    split_rows: int = 0
    masked_messages: int = 0
    shortened_messages: int = 0
    unopened_rows: int = 0
    chat_rows: int = 0
    string_rows: int = 0
    unused_keys: dict[str, int] = field(default_factory=dict)

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
        if self.split_conversations:
            parts.append(
                f"{self.split_conversations:,} conversations made into {self.split_rows:,} rows, "
                "for answers that the chat template writes differently once others follow"
            )
        if self.masked_messages:
            parts.append(f"{self.masked_messages:,} messages masked by their own keys")
        if self.shortened_messages:
            parts.append(f"{self.shortened_messages:,} messages that the chat template does not write whole")
        if self.unused_keys:
            named = [f"{name} ({count:,})" for name, count in list(self.unused_keys.items())[:MOST_NAMED]]
            more = len(self.unused_keys) - len(named)
            parts.append(f"without effect: {', '.join(named)}{f' and {more} more keys' if more else ''}")
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
        most_tokens: how many tokens make it ``full``; None for no such number.

    Attributes:
        cut_away: dropped rows that are longer, and have all their trained tokens in the part that is cut off.
    """

    def __init__(self, max_length: int, scratch: Path | None = None, most_tokens: int | None = None):
        self.max_length, self.most_tokens = max_length, most_tokens
        self.ids: array[int] | ScratchArray = array("i") if scratch is None else ScratchArray(scratch, np.int32)
        self.trained: bytearray | ScratchArray = bytearray() if scratch is None else ScratchArray(scratch, np.bool_)
        self.offsets = array("q", [0])
        self.trained_tokens = self.masked = self.truncated = self.cut_off = self.dropped = self.converted = 0
        self.cut_away = self.chat_rows = self.string_rows = 0
        self.split_conversations = self.split_rows = self.masked_messages = self.shortened = self.unopened = 0
        self.unused: Counter[str] = Counter()

    def count(
        self,
        kept: int,
        chat: bool,
        converted: bool,
        masked: int,
        shortened: int,
        unopened: bool,
        unused: Mapping[str, int],
    ) -> None:
        """Counts what became of a row of the file: ``kept`` rows, and see ``DataReport``."""
        self.chat_rows += kept if chat else 0
        self.string_rows += 0 if chat else kept
        self.converted += converted and kept > 0
        self.masked_messages += masked
        self.shortened += shortened
        self.unopened += kept if unopened else 0
        if kept > 1:
            self.split_conversations += 1
            self.split_rows += kept
        for name, times in unused.items():
            self.unused[name if name in self.unused or len(self.unused) < MOST_KEYS else "others"] += times

    def add(self, ids: Sequence[int], trained: bytes) -> bool:
        """Adds a row, unless nothing of it is trained; ``trained`` has a 1 for every token to train, else a 0."""
        assert len(ids) == len(trained)
        length = min(len(ids), self.max_length)
        entering = trained.count(1, 1, length)
        if entering == 0:
            self.dropped += 1
            self.cut_away += trained.count(1, 1) > 0
            return False
        self.truncated += length < len(ids)
        self.cut_off += len(ids) - length
        self.trained_tokens += entering
        self.masked += trained.count(0, 0, length)
        try:
            self.ids.extend(array("i", ids[:length]))
        except OverflowError:
            raise ValueError(f"the tokenizer gives the id {max(ids)}, which no model has") from None
        self.trained.extend(trained[:length])
        self.offsets.append(self.offsets[-1] + length)
        return True

    @property
    def full(self) -> bool:
        """Whether there are as many tokens as were asked for."""
        return self.most_tokens is not None and self.offsets[-1] >= self.most_tokens

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
            split_conversations=self.split_conversations,
            split_rows=self.split_rows,
            masked_messages=self.masked_messages,
            shortened_messages=self.shortened,
            unopened_rows=self.unopened,
            chat_rows=self.chat_rows,
            string_rows=self.string_rows,
            unused_keys=dict(self.unused.most_common()),
        )
        ids = self.ids if isinstance(self.ids, ScratchArray) else np.frombuffer(self.ids, np.int32)
        trained = self.trained if isinstance(self.trained, ScratchArray) else np.frombuffer(self.trained, np.bool_)
        return TokenizedData(ids, trained, offsets, report)
