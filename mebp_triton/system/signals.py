"""Signals as the command takes them: Ctrl-C and SIGTERM end it in good order, and SIGBUS with one line.

A first Ctrl-C or SIGTERM lets the command finish what must be finished; a second one ends it at once. Importing this
module installs nothing: handlers exist only inside the context managers. A signal that was ignored before (under
``nohup``, or in the background of a script) stays ignored.

The command imports this module before torch, to hear signals early. So nothing here may import torch at the top.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun passes on to its processes what the terminal has already sent them: within this time that is one signal.
ECHO_SECONDS = 1.0
LOST_PAGE_EXIT_CODE = 1


@contextmanager
def interrupting() -> Iterator[None]:
    """While active, a first signal raises ``Interrupted``, and a second one ends the process."""

    def interrupt(number: int) -> None:
        raise Interrupted(number)

    with _handling(interrupt):
        yield


@contextmanager
def noting(announce: bool = True) -> Iterator[Callable[[], int]]:
    """While active, a first signal is noted, and a second one ends the process.

    Args:
        announce: write a line to standard error when the first signal comes.

    Yields:
        A function that returns the number of the noted signal, or 0.
    """
    noted = 0

    def note(number: int) -> None:
        nonlocal noted
        noted = number
        if announce:
            os.write(2, b"\nmebp: stopping as soon as this step is done; once more stops at once\n")

    with _handling(note):
        yield lambda: noted


@contextmanager
def _handling(first: Callable[[int], None]) -> Iterator[None]:
    """While active, the first signal calls ``first`` with its number. Only the main thread may install handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    echo = ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    since: float | None = None

    def handle(number: int, frame: object) -> None:
        nonlocal since
        now = time.monotonic()
        if since is None:
            since = now
            first(number)
        elif now - since >= echo:
            # Nothing needs tidying: files are whole at any time, and the next command removes temporaries.
            os.write(2, (b"\x1b[?25h" if os.isatty(2) else b"") + b"\nmebp: stopped at once\n")
            os._exit(128 + number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in ours:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextmanager
def reporting_lost_pages() -> Iterator[None]:
    """While active, SIGBUS writes one line to standard error and ends the process with code 1.

    Mapped files are compared with their size before each use (``MappedFile.check``). A file that shrinks between that
    check and the read of its last page makes the system send SIGBUS. No exception can answer it, because the
    instruction cannot go on: all that is left is to say what happened. What was saved before is whole, since files are
    replaced in one rename.

    For the command alone: a library must not take a process's signals.
    """
    if not hasattr(signal, "SIGBUS"):
        yield
        return
    from .mapped_file import MappedFile

    reporting = threading.Lock()

    def report(number: int) -> None:
        if not reporting.acquire(blocking=False):
            time.sleep(60)  # another thread lost a page as well, and is about to end the process
        lost = sorted(str(mapped.path) for mapped in list(MappedFile.opened) if mapped.is_cut_short())
        if lost:
            line = f"{', '.join(lost)} was cut short while it was in use: what was saved before is whole"
        else:
            line = (
                "a page of a mapped file cannot be read: the disk failed, or a file was cut short while it was in use"
            )
        os.write(2, f"mebp: error: {line}\n".encode(errors="surrogateescape"))
        os._exit(LOST_PAGE_EXIT_CODE)

    # A handler of Python's own would run only after the instruction, which never ends. This one runs in the thread that
    # read the page, where torch computes without the interpreter's lock.
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(report)
    before = set_handler(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGBUS, before)
