"""Rows from text files: JSON lines, JSON arrays, and tables of comma-separated values."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mebp_triton.system import strict_json

PIECE_CHARS = 1 << 15
MOST_CELL_CHARS = 1 << 26
# How far before the end of the text that is there a fault may lie and yet come from the cut: the longest thing that the
# decoder looks at as one, beside strings, is a pair of escapes.
CUT_CHARS = 16


class BrokenRow(ValueError):
    """A row cannot be read. ``load_data`` catches it, to name the file beside the row's number."""

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(problem)
        self.number = number


def jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the line's number and its JSON. A file that begins with ``[`` is read as an array."""
    if _begins_an_array(path):
        yield from json_rows(path)
        return
    with path.open("rb") as file:  # as bytes, since only \n ends a row: text mode would also cut at a lone \r
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, json.loads(text, object_pairs_hook=strict_json.no_duplicates)
            except UnicodeError as error:
                raise BrokenRow(number, f"not UTF-8 ({error}); convert the file") from error
            except (ValueError, RecursionError) as error:
                raise BrokenRow(
                    number, f"broken JSON ({error}); write one object a line, or name the file .json"
                ) from error


def _begins_an_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(PIECE_CHARS).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the items of an array, or JSON values one after the other (as JSON lines), each with its number from 1.

    Memory holds a piece of the file, and one item.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        values = _Values(file)
        array = values.next_char() == "["
        if array:
            values.place += 1
        while (char := values.next_char()) != ("]" if array else ""):
            if values.number and array:
                if char != ",":
                    raise BrokenRow(values.number + 1, f"broken JSON (a comma or ] is wanted, got {char!r})")
                values.place += 1
                if values.next_char() == "]":
                    raise BrokenRow(values.number + 1, "broken JSON (a comma before the end of the array)")
            yield values.decode()
        values.place += array
        if char := values.next_char():
            raise BrokenRow(values.number, f"broken JSON ({char!r} behind the end of the array)")


class _Values:
    """JSON values in a text that is read piece by piece."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.text, self.place, self.number = file, "", 0, 0
        self.decoder = json.JSONDecoder(object_pairs_hook=strict_json.no_duplicates)

    def more(self, chars: int = 0) -> bool:
        """Reads on, a piece or ``chars`` if that is more, and forgets what has been decoded; False at the end."""
        try:
            piece = self.file.read(max(PIECE_CHARS, chars))
        except UnicodeError as error:
            raise BrokenRow(self.number + 1, f"not UTF-8 ({error}), there or soon after; convert the file") from error
        self.text, self.place = self.text[self.place :] + piece, 0
        return bool(piece)

    def next_char(self) -> str:
        """The next character that is no white space, where ``place`` then is; "" at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def decode(self) -> tuple[int, Any]:
        """The value at ``place``, with its number."""
        self.number += 1
        self.next_char()
        while True:
            try:
                value, self.place = self.decoder.raw_decode(self.text, self.place)
                return self.number, value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - CUT_CHARS
                # Twice as much each time, so that a long value is not decoded again too often.
                if not (cut and self.more(len(self.text) - self.place)):
                    raise BrokenRow(self.number, f"broken JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise BrokenRow(self.number, f"broken JSON ({error})") from error


def csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the number of the line on which a row begins, and its cells by the names in the first row, as strings."""
    _check_separator(path)
    limit = csv.field_size_limit(MOST_CELL_CHARS)  # Python's own, 131,072, is less than some texts
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, strict=True)
            names, last = _next_cells(table, 1), table.line_num
            if names is None:
                return
            # Tables of pandas and R begin with a column of row numbers that has no name.
            names = [name or f"column {place}" for place, name in enumerate(names, start=1)]
            if len(set(names)) != len(names):
                raise BrokenRow(1, f"the first row must name the columns, each by another name, got {names!r:.200}")
            while (cells := _next_cells(table, last + 1)) is not None:
                number, last = last + 1, table.line_num
                if not cells:
                    continue  # a blank line
                if len(cells) != len(names):
                    raise BrokenRow(
                        number,
                        f"{len(cells)} cells, and the first row names {len(names)}; "
                        'put cells with commas, quotes or line ends between quotes (")',
                    )
                yield number, dict(zip(names, cells, strict=True))
    finally:
        csv.field_size_limit(limit)


def _check_separator(path: Path) -> None:
    """Raises BrokenRow where the names of the columns stand between other signs than commas."""
    with path.open("rb") as file:
        names = file.readline(PIECE_CHARS)
    for sign, shown in ((b";", "semicolons"), (b"\t", "tabs"), (b"|", "bars (|)")):
        if sign in names and b"," not in names and b"\0" not in names:  # as bytes, since it may be no UTF-8
            raise BrokenRow(
                1, f"the columns are separated by {shown}: save it with commas, and cells with commas between quotes"
            )


def _next_cells(table: Any, number: int) -> list[str] | None:
    """The next row of the table, which begins on line ``number``; None at the end."""
    try:
        return next(table, None)
    except UnicodeError as error:
        raise BrokenRow(number, f"not UTF-8 ({error}), there or soon after; convert the file") from error
    except csv.Error as error:
        raise BrokenRow(number, f"broken CSV ({error})") from error
