"""File operations that fail, or end the process, at the n-th call.

The faults are put into the standard library's functions, through which every write of the package goes: a function of
``os`` fails here as it does on a full disk, whoever calls it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

# The operations on the way to a finished file.
WRITING: Sequence[tuple[Any, str]] = (
    (os, "replace"),
    (os, "fsync"),
    (os, "chmod"),
    (os, "open"),
    (tempfile, "mkstemp"),
    (tempfile, "mkdtemp"),
    (Path, "write_bytes"),
)


def full(*arguments: Any, **options: Any) -> Any:
    """In place of an operation: the disk is full."""
    raise OSError(28, "No space left on device")


def half_written(*arguments: Any, **options: Any) -> Any:
    """In place of a write: it stops in the middle, as a full disk does it."""
    if len(arguments) == 2 and isinstance(arguments[1], bytes):
        with open(arguments[0], "wb") as file:
            file.write(arguments[1][: len(arguments[1]) // 2])
    full()


@dataclass
class Count:
    operations: int = 0


@contextmanager
def failing(
    at: int, fault: Callable[..., Any] = full, operations: Sequence[tuple[Any, str]] = WRITING
) -> Iterator[Count]:
    """While active, operation number ``at`` (from 1) is ``fault``. Yields the count of operations so far."""
    count = Count()

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            count.operations += 1
            return (fault if count.operations == at else original)(*arguments, **options)

        return operation

    patches = [mock.patch.object(owner, name, counted(getattr(owner, name))) for owner, name in operations]
    for patch in patches:
        patch.start()
    try:
        yield count
    finally:
        for patch in patches:
            patch.stop()
