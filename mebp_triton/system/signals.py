"""Ctrl-C and SIGTERM, as the command takes them: a first one ends it in good order, a second one at once.

Importing this installs nothing. Handlers are there within the two context managers, and only in the main thread. A
signal that was ignored before (under ``nohup``, or in the background of a script) stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun hands on to its processes what the terminal has sent them as well: within this time that is one signal.
ECHO_SECONDS = 1.0


@contextmanager
def interrupting() -> Iterator[None]:
    """Within, a first signal raises ``Interrupted``, and a second one ends the process."""

    def interrupt(number: int) -> None:
        raise Interrupted(number)

    with _handling(interrupt):
        yield


@contextmanager
def noting(announce: bool = True) -> Iterator[Callable[[], int]]:
    """Within, a first signal is noted, and a second one ends the process.

    Args:
        announce: a line on standard error says that the first one came.

    Yields:
        The number of the signal that was noted, or 0, when called.
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
            # Nothing is tidied up: files are whole at any time, and what is temporary goes with the next command.
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
