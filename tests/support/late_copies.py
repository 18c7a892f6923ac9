"""A device on CPU tensors whose copies are made as late as the waits allow, and that notices where one is missing."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class MissingWait(AssertionError):
    """A copy reads or writes memory for which it does not wait, or that is not kept for it."""


class _Memory:
    """A tensor's place, which does not keep its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.form = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.dtype, self.address = tensor.dtype, tensor.untyped_storage().data_ptr()

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise MissingWait("memory was given back before a copy from or to it was over")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.form)


@dataclass
class _Line:
    """One of the two streams: what is recorded on it, and what happens where it waits."""

    record: Callable[[], Any]
    wait: Callable[[Any], None]

    def record_event(self) -> Any:
        return self.record()

    def wait_event(self, event: Any) -> None:
        self.wait(event)


class LateStreams(TorchDispatchMode):
    """Streams of a simulated device; the tensors that it computes with are the CPU's. Active while it computes.

    Args:
        seed: draws which copies are made at once. None: each is made as late as possible.
        forgotten: a wait that is left out: "computing" or "copying".

    Attributes:
        copies: how many were started.
        beside: the numbers of those that were under way while something was computed.
    """

    def __init__(self, seed: int | None = None, forgotten: str = "") -> None:
        super().__init__()
        self.draws, self.forgotten = None if seed is None else random.Random(seed), forgotten
        self.computed = self.known = self.copies = 0
        self.pending: deque[tuple[int, _Memory, _Memory]] = deque()
        self.beside: set[int] = set()
        self.copying = _Line(lambda: self.copies, self._copying_waits)

    def computing(self) -> _Line:
        return _Line(lambda: self.computed, self._computing_waits)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.computed += 1
        self.beside.update(number for number, *_ in self.pending)
        return func(*args, **(kwargs or {}))

    def copy(self, target: Tensor, source: Tensor) -> None:
        if self.known < self.computed:
            raise MissingWait("a copy does not wait for the computation before it")
        self.copies += 1
        with _disable_current_modes():
            places = _Memory(target), _Memory(source)
            if all(places[0].address != other.address for _, *both in self.pending for other in both):
                target.view(torch.uint8).fill_(255)  # NaN, for whoever does not wait
        self.pending.append((self.copies, *places))
        if self.draws is not None and self.draws.random() < 0.5:
            self._copy_until(self.copies)

    def synchronize(self) -> None:
        self._copy_until(self.copies)

    def _copying_waits(self, computed: int) -> None:
        if self.forgotten != "copying":
            self.known = max(self.known, computed)

    def _computing_waits(self, copies: int) -> None:
        if self.forgotten != "computing":
            self._copy_until(copies)

    def _copy_until(self, number: int) -> None:
        while self.pending and self.pending[0][0] <= number:
            _, target, source = self.pending.popleft()
            with _disable_current_modes():
                target.tensor().copy_(source.tensor())
