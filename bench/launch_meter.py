"""Counts the launches and the host time of a step by phase: what each operation of torch launches on CUDA."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Multiplications of a product from which on it is left out.
LARGE = 1 << 24

# Operations that launch nothing, beside views: they allocate, or only change what a tensor says of itself.
NOTHING = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
NOTHING |= {"detach", "set_", "resize_", "_reshape_alias", "alias", "is_pinned", "promote_types"}
# Operations for which the host waits until the device has come so far.
SYNCHRONISES = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}
# Tensors that one launch of an operation on lists takes, by the number of lists (depth_to_max_tensors in
# ATen/native/cuda/MultiTensorApply.cuh).
LIST_SIZES = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


def launches_of(name: str, is_view: bool, arguments: tuple[Any, ...]) -> int:
    """The kernels, and copies from or to the host, that one operation of torch launches on CUDA.

    It is one for all but these: views and allocations launch none. An operation on lists of tensors launches one for as
    many as its table of pointers holds, norms two. ``addmm`` with a matrix first copies it (a bias is an epilogue). The
    gradient of a slice is zeros and a copy. Flash attention launches one kernel forward; backward three, and two sums
    where heads share keys. Not counted are parts of one call of a library: a reduction after a product that cuBLAS
    splits, the clearing of a semaphore.
    """
    if is_view or name in NOTHING:
        return 0
    if name.startswith(("_foreach_", "_fused_adam")):
        lists = [argument for argument in arguments if isinstance(argument, (list, tuple)) and _of_tensors(argument)]
        count = math.ceil(len(lists[0]) / LIST_SIZES[min(len(lists), 5)])
        return count + 1 if "norm" in name else count
    if name in ("addmm", "baddbmm"):
        return 1 if arguments[0].dim() == 1 else 2
    if name in ("slice_backward", "select_backward"):
        return 2
    if name.startswith("_scaled_dot_product_flash_attention"):
        if "backward" not in name:
            return 1
        query, key = arguments[1:3]
        return 3 if query.shape[1] == key.shape[1] else 5
    return 1


def _of_tensors(values: Any) -> bool:
    return len(values) > 0 and isinstance(values[0], Tensor)


def is_view(func: Any) -> bool:
    """Whether an operation only looks at its argument: its result is an alias, and nothing is written."""
    returns = [one.alias_info for one in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returns)


class Meter(TorchDispatchMode):
    """Counts launches and host time by phase.

    Attributes:
        on_host: addresses of tensors that lie in host memory where the model is on a GPU.
        launches, operations: by phase; the latter by phase and name.
        waits: by phase, how often the host waits for the device.
        seconds: by phase.
        implementations: operations of others that are counted by what they do inside, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "outside"
        self.on_host: set[int] = set()
        self.implementations: dict[str, Callable[..., Any]] = {}
        self.reset()

    def reset(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.operations: Counter[tuple[str, str]] = Counter()
        self.seconds: Counter[str] = Counter()
        self._since = time.thread_time()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """While active, what happens belongs to ``phase``."""
        outer = self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, phase: str) -> str:
        now, outer = time.thread_time(), self.phase
        self.seconds[outer] += now - self._since
        self.phase, self._since = phase, now
        return outer

    def launched(self, name: str, count: int = 1) -> None:
        self.launches[self.phase] += count
        self.operations[self.phase, name] += count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        qualified = func._schema.name
        space, name = qualified.split("::")
        inside = self.implementations.get(qualified) or _custom(qualified)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        if space == "aten" and not self._on_host((*args, *kwargs.values())):
            if count := launches_of(name, is_view(func), (*args, *kwargs.values())):
                self.launched(name, count)
            self.waits[self.phase] += name in SYNCHRONISES
        if name in ("mm", "addmm", "bmm") and args[-1].numel() * args[-2].shape[-2] > LARGE:
            return args[-1].new_empty(*args[-2].shape[:-1], args[-1].shape[-1])
        return func(*args, **kwargs)

    def _on_host(self, arguments: Any) -> bool:
        """Whether an operation is one of the host: it reads a tensor there, or makes one without bytes."""
        leaves = tree_leaves(arguments)
        if any(isinstance(leaf, torch.device) and leaf.type == "meta" for leaf in leaves):
            return True
        return any(isinstance(leaf, Tensor) and leaf.data_ptr() in self.on_host for leaf in leaves)


def _custom(qualified: str) -> Callable[..., Any] | None:
    """Returns the function behind an operation that was made by ``torch.library.custom_op``."""
    made = torch._library.custom_ops.OPDEFS.get(qualified)
    return None if made is None else made._init_fn


@contextmanager
def recompute_apart(meter: Meter, kind: type[nn.Module]) -> Iterator[None]:
    """While active, what a block of this class runs within a backward pass belongs to the phase "recompute"."""
    # transformers 5 puts the checkpointing into the class's ``forward``, which must stay the class's own.
    outer: Any = kind.forward
    own = getattr(outer, "__wrapped__", outer)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with meter.during("recompute" if meter.phase == "backward" else meter.phase):
            return own(self, *args, **kwargs)

    if own is outer:
        with mock.patch.object(kind, "forward", forward):
            yield
        return
    cell = next(cell for cell in outer.__closure__ if cell.cell_contents is own)
    cell.cell_contents = forward
    try:
        yield
    finally:
        cell.cell_contents = own
