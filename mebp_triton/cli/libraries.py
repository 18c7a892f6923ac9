"""The libraries of a command, imported as quickly as they can be; most of the time before a first token is theirs.

Used where the process runs one command and nothing else: what is done here holds for the whole process.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from .console import silence_transformers
from .lazy_compiler import load_compiler_late

SINGLE_PROCESS = ("eval", "generate")  # they compile nothing, and no other process takes part


def load_libraries(command: str) -> None:
    """Imports transformers, silenced, and what ``command`` begins with where it runs a model."""
    with _no_collection():
        if command in SINGLE_PROCESS:
            load_compiler_late()
            with _no_processes():
                silence_transformers()
                import mebp_triton.cli.inference  # noqa: F401
        elif command == "train":
            silence_transformers()
            import mebp_triton.cli.training_run  # noqa: F401


@contextmanager
def _no_collection() -> Iterator[None]:
    """While active, no garbage is collected; what there is at the end is not looked at again before the process ends.

    A collector that walks through all modules again and again takes a fifth of the time of importing them.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if "triton" in sys.modules:  # it counts at the end which of its objects are left, and complains
            atexit.register(gc.unfreeze)
        gc.enable()


@contextmanager
def _no_processes() -> Iterator[None]:
    """While active, transformers finds no ``torch.distributed``, and leaves out tensors spread over processes."""
    import torch.distributed

    with patch.object(torch.distributed, "is_available", lambda: False):
        yield
