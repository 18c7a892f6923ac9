"""Errors of other libraries: told apart, and made one line for the user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever a library raises over a bad file into one ``ValueError`` line: the kinds differ by version."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        if is_out_of_memory(error):  # no fault of the file's
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{what} ({type(error).__name__}: {reason:.300}); {remedy}") from error


OUT_OF_MEMORY: tuple[str, ...] = (
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "can't start new thread",
)
OUT_OF_MEMORY += ("bad_alloc", "failed to map segment")


def is_out_of_memory(error: BaseException) -> bool:
    """Python, the system, the loader, and torch on a CPU and a GPU have each their own way to say it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    kinds = (RuntimeError, ImportError)
    said = isinstance(error, kinds) and any(words in str(error) for words in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError)
