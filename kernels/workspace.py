"""Memory that products need for a moment: the size of a panel, and buffers that are used again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .configs import PANEL

# Elements of one panel on a CPU: 4 MiB of float32.
CPU_ELEMENTS = 1 << 20


class Workspace:
    """The size of a panel, and the buffers that panels on a CPU reuse, since making one anew costs page faults.

    Every thread has a workspace of its own (``use_workspace`` replaces it). Only one decoder of a workspace may have a
    panel in use at a time.

    Attributes:
        cpu_elements, gpu_elements: elements of one panel on a CPU, and on any other device.
        keep: whether buffers on a CPU are kept.
        buffers: the buffers so far, by name and dtype, as large as the largest panel that was asked for.
    """

    def __init__(self, cpu_elements: int = CPU_ELEMENTS, gpu_elements: int = PANEL.elements, keep: bool = True) -> None:
        self.cpu_elements, self.gpu_elements, self.keep = cpu_elements, gpu_elements, keep
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def elements(self, device: torch.device) -> int:
        return self.cpu_elements if device.type == "cpu" else self.gpu_elements

    def buffer(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory ``[size]``: on a CPU the buffer of that name, elsewhere a tensor of its own."""
        if device.type != "cpu" or not self.keep or size > self.elements(device):
            return torch.empty(size, dtype=dtype, device=device)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=dtype)
            self.buffers[name, dtype] = buffer
        return buffer[:size]


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.workspace = Workspace()


_thread = _ThreadState()


def workspace() -> Workspace:
    """The workspace of this thread."""
    return _thread.workspace


@contextmanager
def use_workspace(other: Workspace) -> Iterator[None]:
    """While active, this thread's panels have the sizes and the buffers of ``other``.

    This is how the planner counts a run's memory: with the panel sizes of the device, and buffers that hold no data.
    """
    before, _thread.workspace = _thread.workspace, other
    try:
        yield
    finally:
        _thread.workspace = before


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a trace without data, on which nothing runs."""
    return isinstance(tensor, FakeTensor)


def is_watched(tensor: Tensor) -> bool:
    """Whether something must see an operation on ``tensor`` as one.

    That is a compiler, a mode, the tensor's class, or vmap, by which torch computes batched gradients too.
    """
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.is_batchedtensor(tensor)
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
    )
