"""Weights copied to a device while a block runs: two arenas, a thread that fills them, and a stream."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mebp_triton.layers.int4_module import Int4Module
from mebp_triton.system.machine import is_unified

from .pages import Pages
from .reader import Store, StoreFile
from .waiting import Waiting


@dataclass(eq=False)
class _Arena:
    """A buffer on the device that holds one block's data section at a time.

    Attributes:
        owner: whose data it holds, or is about to.
        filled: done when the copy was started (on a CPU: made).
        copied: on a GPU, when the copy has ended. free: when the last computation that reads it has.
    """

    buffer: Tensor
    owner: ArenaPages | None = None
    in_use: bool = False
    filled: Future[None] | None = None
    staging: Tensor | None = None
    copied: Any = None
    free: Any = None


@dataclass(eq=False)
class Stager:
    """Two arenas on a device, and the thread that fills them.

    Attributes:
        size: bytes of an arena: those of the largest block.
    """

    device: torch.device
    waiting: Waiting
    size: int
    arenas: list[_Arena] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unified = is_unified(self.device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="mebp-pages")

    def prefetch(self, owner: ArenaPages) -> None:
        if self._holding(owner) is None and (arena := self._least_needed()) is not None:
            self._start(arena, owner)

    def acquire(self, owner: ArenaPages) -> Tensor:
        """The owner's data section on the device, until ``release``."""
        arena = self._holding(owner)
        if arena is None:
            arena = self._least_needed() or self._new()
            self._start(arena, owner)
        assert arena.filled is not None
        arena.in_use = True
        try:
            with self.waiting.counted():
                arena.filled.result()
        except BaseException:
            arena.owner, arena.in_use = None, False
            raise
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(arena.copied)
        return arena.buffer[: owner.size]

    def release(self, owner: ArenaPages) -> None:
        arena = self._holding(owner)
        assert arena is not None and arena.in_use
        arena.in_use = False
        if self.stream is not None:
            arena.free = torch.cuda.current_stream(self.device).record_event()

    def _holding(self, owner: ArenaPages) -> _Arena | None:
        return next((arena for arena in self.arenas if arena.owner is owner), None)

    def _least_needed(self) -> _Arena | None:
        """An arena whose block has run; the one that waits longest. None if there is none and two exist already."""
        if len(self.arenas) < 2:
            return self._new()
        return next((arena for arena in self.arenas if not arena.in_use), None)

    def _new(self) -> _Arena:
        arena = _Arena(torch.empty(self.size, dtype=torch.uint8, device=self.device))
        if self.stream is not None:  # the memory may have been another tensor's
            arena.free = torch.cuda.current_stream(self.device).record_event()
        self.arenas.append(arena)
        return arena

    def _start(self, arena: _Arena, owner: ArenaPages) -> None:
        if arena.filled is not None and not arena.filled.done():
            arena.filled.exception()  # it was read ahead for a block that did not come: the read must end first
        self.arenas.remove(arena)
        self.arenas.append(arena)  # the others have waited longer
        arena.owner = owner
        arena.filled = self.thread.submit(self._fill, arena, owner)

    def _fill(self, arena: _Arena, owner: ArenaPages) -> None:
        target = arena.buffer[: owner.size]
        if self.stream is None:
            owner.read(target)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            source = self._source(arena, owner)
            if arena.free is not None:
                self.stream.wait_event(arena.free)
            target.copy_(source, non_blocking=True)
            arena.copied = self.stream.record_event()

    def _source(self, arena: _Arena, owner: ArenaPages) -> Tensor:
        """The bytes where the device copies from: pinned, but where host and device memory are one."""
        if owner.host is not None:
            return owner.host
        if self.unified:
            owner.file.verify()
            return owner.file.data()
        if arena.copied is not None:
            arena.copied.synchronize()
        if arena.staging is None:
            arena.staging = torch.empty(self.size, dtype=torch.uint8, pin_memory=True)
        owner.read(arena.staging[: owner.size])
        return arena.staging[: owner.size]


class ArenaPages(Pages):
    """Weights that are views of an arena while within, and lie nowhere (on the meta device) otherwise."""

    def __init__(
        self, store: Store, file: StoreFile, modules: Mapping[str, Int4Module], stager: Stager, host: Tensor | None
    ) -> None:
        self.store, self.file, self.modules, self.stager, self.host = store, file, modules, stager, host
        self.size = file.data().numel()
        self.depth = 0
        self._leave()

    def read(self, target: Tensor) -> None:
        """The data section into a CPU tensor."""
        if self.host is not None:
            target.copy_(self.host)
            return
        self.file.verify()
        self.file.mapped.read(target, self.file.start)

    def prefetch(self) -> None:
        self.stager.prefetch(self)

    def __enter__(self) -> None:
        if self.depth:
            self.depth += 1
            return
        self.file.mapped.check()
        data = self.stager.acquire(self)
        self.depth = 1
        for name, module in self.modules.items():
            module.set_int4(self.store.weight(name, data))

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.stager.release(self)
            self._leave()
            if self.host is None:
                self.file.mapped.drop()

    def _leave(self) -> None:
        for name, module in self.modules.items():
            module.set_int4(self.store.weight(name).to("meta"))
