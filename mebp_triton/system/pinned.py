"""Host memory that a GPU copies from and to by itself, while the host goes on."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import torch
from torch import Tensor

from .machine import is_unified


def copies_alone(device: torch.device) -> bool:
    """Whether copies to and from ``device`` are faster from pinned memory: a CUDA device with memory of its own."""
    return device.type == "cuda" and not is_unified(device)


def host_bytes(size: int, device: torch.device) -> Tensor:
    """Zeros ``[size]`` uint8 in host memory, for copies to and from ``device``; pinned where that helps.

    Torch's own pinned memory comes in powers of two. This is as large as asked for, in whole pages: they are mapped for
    this tensor alone, and registered with CUDA as long as it, or a view of it, is there.
    """
    if size == 0 or not copies_alone(device):
        return torch.zeros(size, dtype=torch.uint8)
    pages = _Pages(-1, size)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()
    with torch.cuda.device(device):
        refused = int(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
    if refused:  # by a limit on locked memory, say; torch may still have some
        _forget_refusal(device)
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    pages.registered = runtime, memory.data_ptr(), device
    return memory


def _forget_refusal(device: torch.device) -> None:
    """Takes the error of a refused call out of CUDA's runtime, where it would be that of the next kernel launch.

    The runtime gives an error once to whoever asks for the last one, as torch does after each launch of its own.
    """
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device=device).fill_(0)


class _Pages(mmap.mmap):
    """Mapped pages, which end their registration before they are unmapped.

    Attributes:
        registered: CUDA's runtime, the first address and the device, once they are registered.
    """

    registered: tuple[Any, int, torch.device] | None = None

    def __del__(self) -> None:
        if self.registered is not None:
            runtime, address, device = self.registered
            torch.cuda.synchronize(device)  # a copy from or to them may be under way
            runtime.cudaHostUnregister(address)
