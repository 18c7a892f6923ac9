"""Weights that are copied to a device while a block runs: two arenas, a thread that fills them, and a stream.

A block's bytes come by one read and one copy into an arena. There are two arenas, so that the next block's read and
copy, in a thread and on a stream of their own, run while this block computes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.system.machine import is_unified
from mebp_triton.system.pinned import host_bytes

from .experts import ExpertPlaces, Span, others_in, spans_of, tensors_of, views_of
from .pages import Pages, WeightHolder
from .reader import Store, StoreFile
from .waiting import Waiting


@dataclass(eq=False)
class _Arena:
    """A buffer on the device that holds one block's data section at a time.

    Attributes:
        owner: the pages whose data it holds, or is about to hold.
        in_use: whether its block is running.
        filled: done once the copy into it has been started on the stream (on a CPU: made).
        staging: pinned host memory that the copy reads.
        copied: the event on the copying stream after which the data is there.
        free: the event on the computing stream after which the buffer may be overwritten.
        experts: the experts of mixtures whose bytes it has, beside the rest of the block.
    """

    buffer: Tensor
    owner: ArenaPages | None = None
    in_use: bool = False
    filled: Future[None] | None = None
    staging: Tensor | None = None
    copied: Any = None
    free: Any = None
    experts: set[tuple[int, int]] = field(default_factory=set)


@dataclass(eq=False)
class Stager:
    """Two arenas on a device, and the thread that fills them.

    Attributes:
        size: the bytes of an arena: those of the largest block.
        arenas: in the order in which they were last given to a block.
    """

    device: torch.device
    waiting: Waiting
    size: int
    arenas: list[_Arena] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unified = is_unified(self.device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="mebp-pages")

    def __deepcopy__(self, memo: dict[int, Any]) -> Stager:
        """Arenas, a thread and a stream of their own, for a copy of the model."""
        made = memo[id(self)] = Stager(self.device, copy.deepcopy(self.waiting, memo), self.size)
        return made

    def prefetch(self, owner: ArenaPages) -> None:
        """Starts to fill an arena for ``owner``, if one can be spared. Returns at once."""
        if self._arena_of(owner) is None and (arena := self._spare_arena()) is not None:
            self._start(arena, owner)

    def acquire(self, owner: ArenaPages) -> Tensor:
        """Waits for the owner's data section on the device; it stays there until ``release``."""
        arena = self._arena_of(owner)
        if arena is None:
            arena = self._spare_arena() or self._new_arena()
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

    def bring(self, owner: ArenaPages, place: int, experts: Sequence[int]) -> Tensor:
        """Copies experts of the owner's mixture number ``place`` to their place in the data section on the device.

        The owner's block must be running. The copy is ordered before what this thread computes next.
        """
        arena, source = self._arena_of(owner), owner.experts[place]
        assert arena is not None and arena.in_use
        new = [expert for expert in experts if (place, expert) not in arena.experts]
        with self.waiting.counted():
            for expert in new:
                self._copy(arena, owner, source.tensors[expert], source.spans[expert])
        if self.stream is not None and new:
            arena.copied = torch.cuda.current_stream(self.device).record_event()  # till when the staging is read
        arena.experts.update((place, expert) for expert in new)
        self.waiting.count_experts(source.spans, new)
        return arena.buffer[: owner.size]

    def _copy(self, arena: _Arena, owner: ArenaPages, tensors: list[str], spans: list[Span]) -> None:
        """Copies some tensors to the device, after what this thread has computed so far."""
        if owner.host is None:
            owner.file.verify(tensors)
        if self.stream is None:
            owner.read_spans(arena.buffer, spans)
            return
        source = owner.host if owner.host is not None else owner.file.data() if self.unified else arena.staging
        assert source is not None
        if source is arena.staging:
            owner.read_spans(source, spans)
        for begin, end in spans:
            arena.buffer[begin:end].copy_(source[begin:end], non_blocking=True)

    def release(self, owner: ArenaPages) -> None:
        """Lets the owner's arena be filled for another, once the computations that were started have read it."""
        arena = self._arena_of(owner)
        assert arena is not None and arena.in_use
        arena.in_use = False
        if self.stream is not None:
            arena.free = torch.cuda.current_stream(self.device).record_event()

    def _arena_of(self, owner: ArenaPages) -> _Arena | None:
        return next((arena for arena in self.arenas if arena.owner is owner), None)

    def _spare_arena(self) -> _Arena | None:
        """An arena whose block does not run, the one that waits longest; None if both run."""
        if len(self.arenas) < 2:
            return self._new_arena()
        return next((arena for arena in self.arenas if not arena.in_use), None)

    def _new_arena(self) -> _Arena:
        arena = _Arena(torch.empty(self.size, dtype=torch.uint8, device=self.device))
        if self.stream is not None:
            # The allocator may have given out memory that computations on the other stream still read.
            arena.free = torch.cuda.current_stream(self.device).record_event()
        self.arenas.append(arena)
        return arena

    def _start(self, arena: _Arena, owner: ArenaPages) -> None:
        """Gives an arena to ``owner``, and lets the thread fill it."""
        if arena.filled is not None and not arena.filled.done():
            # It was read ahead for a block that did not come. That read must end before another writes here; if it
            # failed, nobody needs to know.
            arena.filled.exception()
        self.arenas.remove(arena)
        self.arenas.append(arena)
        arena.owner = owner
        arena.experts.clear()
        self.waiting.paged += sum(end - begin for begin, end in owner.spans)
        arena.filled = self.thread.submit(self._fill, arena, owner)

    def _fill(self, arena: _Arena, owner: ArenaPages) -> None:
        target = arena.buffer[: owner.size]
        if self.stream is None:
            owner.read(target)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            source = self._source(arena, owner)
            # The read above needs not wait for the computations that still use the arena; the copy does.
            if arena.free is not None:
                self.stream.wait_event(arena.free)
            for begin, end in owner.spans:
                target[begin:end].copy_(source[begin:end], non_blocking=True)
            arena.copied = self.stream.record_event()

    def _source(self, arena: _Arena, owner: ArenaPages) -> Tensor:
        """The owner's bytes in host memory; pinned, unless the device's memory is the host's."""
        if owner.host is not None:
            return owner.host
        if self.unified:
            owner.file.verify(owner.tensors)
            return owner.file.data()
        if arena.copied is not None:
            arena.copied.synchronize()  # the last copy may still read the staging buffer
        if arena.staging is None:
            arena.staging = host_bytes(self.size, self.device)
        owner.read(arena.staging[: owner.size])
        return arena.staging[: owner.size]


class ArenaPages(Pages):
    """A block's weights: while active, views of an arena; otherwise on the meta device, without bytes.

    ``experts`` are brought in while the block runs, each to its own place in the arena.
    """

    def __init__(
        self,
        store: Store,
        file: StoreFile,
        modules: Mapping[str, WeightHolder],
        stager: Stager,
        host: Tensor | None,
        experts: Sequence[ExpertPlaces] = (),
    ) -> None:
        self.store, self.file, self.modules, self.stager, self.host = store, file, modules, stager, host
        self.size = file.data().numel()
        self.depth = 0
        self.experts = [ArenaExperts(self, place, of_module.names) for place, of_module in enumerate(experts)]
        # Beside experts, the others; else the whole file.
        self.tensors: list[str] | None = None
        self.spans: list[Span] = [(0, self.size)]
        if experts:
            of_experts = [name for source in self.experts for tensors in source.tensors for name in tensors]
            self.tensors = others_in(file, of_experts)
            self.spans = spans_of(file, self.tensors)
            for of_module, source in zip(experts, self.experts, strict=True):
                of_module.holder.source = source
        self._absent = {name: _as_parameter(store.weight(name).to("meta")) for name in modules}
        # The weights as views of each arena, by its address, made once: the layers know what they did with them.
        self._views: dict[int, dict[str, Int4Weight]] = {}
        self._remove_weights()

    def __deepcopy__(self, memo: dict[int, Any]) -> ArenaPages:
        """The pages of a copy of the model, which shares the bytes in host memory."""
        made = memo[id(self)] = copy.copy(self)
        made.modules, made.stager, made.experts = copy.deepcopy((self.modules, self.stager, self.experts), memo)
        made._views = {}
        return made

    def read(self, target: Tensor) -> None:
        """Reads the data section into a CPU tensor, without the experts."""
        if self.host is None:
            self.file.verify(self.tensors)
        self.read_spans(target, self.spans)

    def read_spans(self, target: Tensor, spans: list[Span]) -> None:
        """Reads parts of the data section, which are verified, to their places in a CPU tensor."""
        for begin, end in spans:
            if self.host is not None:
                target[begin:end].copy_(self.host[begin:end])
            else:
                self.file.mapped.read(target[begin:end], self.file.start + begin)

    def prefetch(self) -> None:
        self.stager.prefetch(self)

    def __enter__(self) -> None:
        if self.depth:
            self.depth += 1
            return
        self.file.mapped.check()
        data = self.stager.acquire(self)
        self.depth = 1
        views = self._views.get(data.data_ptr())
        if views is None:
            views = {name: _as_parameter(self.store.weight(name, data)) for name in self.modules}
            self._views[data.data_ptr()] = views
        for name, module in self.modules.items():
            module.set_int4(views[name])

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.stager.release(self)
            self._remove_weights()
            if self.host is None:
                self.file.mapped.drop()

    def _remove_weights(self) -> None:
        """Leaves only shapes in the modules: using one outside of its block is an error, not another block's weight."""
        for name, module in self.modules.items():
            module.set_int4(self._absent[name])


class ArenaExperts:
    """The experts of one module of a block, number ``place`` among its mixtures, in the arena that the block has."""

    def __init__(self, pages: ArenaPages, place: int, names: Sequence[tuple[str, str]]) -> None:
        self.pages, self.place, self.names = pages, place, names
        self.tensors = [tensors_of(pages.store, pair) for pair in names]
        self.spans = [spans_of(pages.file, tensors) for tensors in self.tensors]

    def bring(self, experts: Sequence[int]) -> list[tuple[Int4Weight, Int4Weight]]:
        """Copies the experts to the device, verified, and returns their weights."""
        data = self.pages.stager.bring(self.pages, self.place, experts)
        return views_of(self.pages.store, self.names, experts, data)


def _as_parameter(weight: Int4Weight) -> Int4Weight:
    """``weight`` with its codes as a parameter: a module then need not make one each time that it is put in place."""
    return replace(weight, packed=nn.Parameter(weight.packed, requires_grad=False))
