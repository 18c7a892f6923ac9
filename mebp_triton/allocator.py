"""What malloc does with freed memory: a process's resident set is what it holds, not what is in use."""

from __future__ import annotations

import ctypes
import gc

# Of glibc's malloc.h.
M_MMAP_THRESHOLD = -3
LARGE = 1 << 20


def return_large_freed_memory() -> bool:
    """Lets every allocation of a MiB or more come from the system, and go back to it when it is freed.

    By itself glibc raises that limit to the largest one that was freed, up to 32 MiB; from then on activations lie in
    its heap, which their gaps keep large. Each new page costs a fault.

    Returns:
        Whether there is a glibc that could be told so. It stays so for the process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE))


def return_free_memory() -> None:
    """Gives back to the system what malloc holds and nobody uses, once. Nothing happens where there is no glibc."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
