"""A mapped file that is cut short while it is read ends the process with one line, and not by SIGBUS.

Mappings are compared with their files before each use (``MappedFile.check``). A file that shrinks between that and the
read of its last page makes the system send SIGBUS, to which no exception answers: the instruction cannot go on. All
that is left is to say what happened. What was saved before is whole, since files are replaced in one rename.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .mapped_file import MappedFile

EXIT_CODE = 1


_said = threading.Lock()


def _say_and_end(number: int) -> None:
    if not _said.acquire(blocking=False):
        time.sleep(60)  # another thread, which lost a page as well, is about to end the process
    lost = sorted(str(mapped.path) for mapped in list(MappedFile.opened) if mapped.is_cut_short())
    what = f"{', '.join(lost)} was cut short while it was in use" if lost else "a page of a mapped file cannot be read"
    more = "what was saved before is whole" if lost else "the disk failed, or a file was cut short while it was in use"
    os.write(2, f"mebp: error: {what}: {more}\n".encode(errors="surrogateescape"))
    os._exit(EXIT_CODE)


@contextmanager
def ending_with_a_line() -> Iterator[None]:
    """Within: SIGBUS writes a line to standard error and ends the process with code 1. For the command alone.

    The handler is run by the thread that read the page, while torch computes without the interpreter's lock.
    """
    if not hasattr(signal, "SIGBUS"):
        yield
        return
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = kind(_say_and_end)
    before = set_handler(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGBUS, before)
