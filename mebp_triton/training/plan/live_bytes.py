"""Counts the live bytes of a computation by running it without data: shapes go through it, memory does not.

The code that is traced is the code that trains, so nothing here repeats what it allocates. Tensors are torch's fake
ones, on the CPU, so that the same kernels are chosen. The int4 operations are opaque to torch. What they do runs in
their place, with buffers that are counted like everything else, and launches nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mebp_triton.kernels.configs import PANEL
from mebp_triton.kernels.ops import IMPLEMENTATIONS
from mebp_triton.kernels.routing import has_triton, resolve_backend
from mebp_triton.kernels.tables import architecture_of, traced_for
from mebp_triton.kernels.workspace import Workspace, use_workspace


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the storages that are made and still referred to. See ``traced``.

    Attributes:
        live: bytes now.
        peak: the highest ``live`` since the last ``restart``.
        fake: torch's mode that makes the tensors. Tensors of two modes cannot meet in one operation.
        workspace: the panels' buffers, which are counted too and kept.

    Args:
        architecture: of the device whose kernels are traced, by its tables; "" for panels in plain torch.
    """

    def __init__(self, workspace: Workspace | None = None, architecture: str = "") -> None:
        super().__init__()
        self.live = self.peak = 0
        self.workspace, self.architecture = workspace or Workspace(), architecture
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._seen: set[int] = set()
        self._transient: dict[Any, int] = {}

    def restart(self) -> int:
        """Returns the peak, and begins a new one."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IMPLEMENTATIONS:
            return self._by_implementation(func, args)
        output = _run(func, args, kwargs or {})
        self._count(output)
        return output

    def _by_implementation(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Returns the op's output. What its panels need on top is traced once for arguments of the same shapes."""
        key = (func, *(_signature(arg) for arg in args))
        if key in self._transient:
            output = func(*args)
            self._count(output)
            self.peak = max(self.peak, self.live + self._transient[key])
            return output
        before = self.restart()
        with self:
            output = IMPLEMENTATIONS[func](*args)
        self._transient[key] = self.peak - self.live
        self.peak = max(self.peak, before)
        return output

    def _count(self, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._seen:
                    self._seen.add(id(storage))
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _gone(self, name: int, size: int) -> None:
        self._seen.discard(name)
        self.live -= size


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs ``func`` on fake tensors. An output whose size depends on data gets its largest size."""
    if func is torch.ops.aten.nonzero.default:
        (tensor,) = args
        return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)
    try:
        return func(*args, **kwargs)
    except DataDependentOutputException:
        # Python asks for a value: checks are told that nothing is wrong, and counts are not zero.
        return False if args[0].dtype == torch.bool else 1


def _signature(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.shape, arg.dtype
    return tuple(arg) if isinstance(arg, list) else arg


def counter_of(device: str, dtype: torch.dtype, backend: str) -> tuple[LiveBytes, str]:
    """A counter for runs on a device, and the backend of what is traced there, "triton" or "panel".

    Launches take the routes of the device's tables. A device that is not here is taken for one that runs kernels, and
    has no tables.

    Args:
        device, dtype, backend: as in the run's settings.
    """
    if device == "cpu":
        return LiveBytes(), "panel"
    memory = Workspace(PANEL.elements, keep=False)  # a device makes its panels anew
    if not torch.cuda.is_available():
        by_kernels = backend != "panel" and has_triton()
        return LiveBytes(memory, "unknown" if by_kernels else ""), "triton" if by_kernels else "panel"
    here = torch.device(device)
    resolved = resolve_backend(backend, here, dtype)
    return LiveBytes(memory, architecture_of(here) if resolved == "triton" else ""), resolved


@contextmanager
def traced(live: LiveBytes) -> Iterator[None]:
    """While active, tensors are fake and counted in ``live``. A real tensor that is used becomes a fake one."""
    with use_workspace(live.workspace), traced_for(live.architecture), live.fake, live:
        yield
