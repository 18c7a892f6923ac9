"""Errors of other libraries: recognised, and turned into one line for the user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# How libraries say in words that memory ran out: torch on a CPU and on a GPU, the loader, and C++.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "can't start new thread",
    "bad_alloc",
    "failed to map segment",
)


@contextmanager
def one_line(problem: str, remedy: str) -> Iterator[None]:
    """While active, any error that a library raises over a bad file becomes a ``ValueError`` of one line.

    Which class a library raises differs by version, so all are taken. Memory that ran out is not the file's fault, and
    its error stays.
    """
    try:
        yield
    except BaseException as error:
        # Libraries in Rust raise a PanicException, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{problem} ({type(error).__name__}: {reason:.300}); {remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, whoever raised it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    in_words = any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError | ImportError) and in_words)
