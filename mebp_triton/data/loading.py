"""Tokenizes a file: ``load_data`` is what the rest of the package calls."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .masking import Masking
from .rows import tokenize_row
from .sources import check_source, rows
from .text import opening, windows
from .text_rows import BrokenRow
from .tokenized import RowWriter, TokenizedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_data(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    name: str = "train-file",
    masking: Masking | None = None,
    scratch: Path | None = None,
    most_tokens: int | None = None,
    date: datetime | None = None,
) -> TokenizedData:
    """Tokenizes a file, row by row.

    Args:
        path: see ``check_source``; text is UTF-8.
        tokenizer: the model's. Text, ``text`` rows and ``prompt`` strings begin as it begins a text (with BOS, where it
            adds one); the end-of-sequence token closes a ``text`` row and a ``completion`` string. What chat messages
            need is up to the chat template.
        max_length: tokens; longer rows are cut, text is cut into windows of this length.
        name: the file's name in error messages, which also decides on the split of a directory; see ``check_source``.
        masking: which tokens enter the loss; by default ``Masking()``.
        scratch: a directory for a temporary file that takes the tokens, so that they are no resident memory. It has no
            name, and the system removes it with the process. None keeps them in memory. The rows are the same.
        most_tokens: the rows after the one that reaches so many tokens are not read; None for all rows.
        date: what a chat template that writes the date takes for now; None for the time of this call.

    Raises:
        ValueError: the file cannot be read, is not what its suffix says, or holds nothing to train on.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, since a row's first token is not predicted; got {max_length}")
    paths, masking, date = check_source(path, name), masking or Masking(), date or datetime.now()
    writer = RowWriter(max_length, scratch, most_tokens)
    for part in paths:
        where = f"{name} {part}"
        try:
            if part.suffix.lower() == ".txt":
                _add_text(part, tokenizer, writer, masking, where)
            else:
                _add_rows(part, tokenizer, writer, masking, where, date)
        except OSError as error:
            raise ValueError(f"{where}: cannot be read ({error.strerror}); give a readable file") from error
    where = f"{name} {paths[0] if len(paths) == 1 else path}"
    data = writer.finish()
    if not len(data):
        what = {"train-file": "train on", "calibration-file": "calibrate with"}.get(name, "evaluate")
        raise ValueError(f"{where}: nothing to {what}, {_emptiness(writer)}")
    return data


def _emptiness(writer: RowWriter) -> str:
    """Why no row is left, and what helps."""
    if not writer.dropped:
        return "it is empty; add text"
    problem = f"all {writer.dropped:,} rows are too short or fully masked"
    if not writer.cut_away:
        return f"{problem}; add longer rows, or mask less"
    return f"{problem}; raise max_length (now {writer.max_length}): what {writer.cut_away:,} would train is cut off"


def _add_text(path: Path, tokenizer: PreTrainedTokenizerBase, writer: RowWriter, masking: Masking, where: str) -> None:
    try:
        masking.check_text()
        with path.open(encoding="utf-8-sig") as file:  # a byte-order mark is not text
            for ids in windows(tokenizer, file.read, writer.max_length):
                writer.add(ids, b"\1" * len(ids))
                if writer.full:
                    break
    except UnicodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); convert the file") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _add_rows(
    path: Path, tokenizer: PreTrainedTokenizerBase, writer: RowWriter, masking: Masking, where: str, date: datetime
) -> None:
    numbered, head = rows(path), opening(tokenizer)
    while not writer.full:
        try:
            number, row = next(numbered)
        except StopIteration:
            return
        except BrokenRow as error:
            raise ValueError(f"{where}:{error.number}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        try:
            found = tokenize_row(tokenizer, row, masking, head, date)
            kept = sum([writer.add(*part) for part in found.parts])
            writer.count(
                kept,
                found.chat,
                found.converted,
                found.masked_messages,
                found.shortened_messages,
                found.unopened,
                found.unused,
            )
        except UnicodeError as error:  # the file is UTF-8, but JSON's escapes can spell what is no text
            raise ValueError(f"{where}:{number}: half a surrogate pair is no text ({error}); remove it") from error
        except ValueError as error:
            raise ValueError(f"{where}:{number}: {error}") from error
