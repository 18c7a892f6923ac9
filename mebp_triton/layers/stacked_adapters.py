"""Adapters in the dtype in which they compute, those of layers with one input below each other.

A product takes the adapters of all layers that share its input as two matrices, ``A`` ``[sum R, K]`` and ``B``
``[sum N, R]``. ``stack`` makes them of the layers' own tensors. A block has all of its layers' made at once, in one
launch, when its first layer asks (``BlockAdapters``).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # elements; the kernels load 16 bytes at a time from an address that is a multiple of 16

# A layer's bias ``[N]``, which may be missing, lora_a ``[R, K]`` and lora_b ``[N, R]``.
Adapter = tuple[Tensor | None, Tensor, Tensor]


@dataclass(frozen=True)
class Stacked:
    """The adapters of layers with one input, in one dtype.

    Attributes:
        a: ``[members * R, K]``, the layers' below each other, where R is the largest rank. Rows that a smaller rank
            lacks are zero, so that a kernel sees one rank.
        b: ``[sum N, R]``, likewise.
        bias: ``[sum N]``, zeros for a layer without; None if no layer has one.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None

    def member(self, place: int, rank: int, first: int, stop: int) -> Stacked:
        """The adapter of one layer: of its place, the rank of all, and its rows of ``b``."""
        bias = None if self.bias is None else self.bias[first:stop]
        return Stacked(self.a[place * rank : (place + 1) * rank], self.b[first:stop], bias)


def stack(adapters: Sequence[Adapter], dtype: torch.dtype) -> Stacked:
    """The adapters in ``dtype``: the layer's own tensors where it is one and they have it, else copies."""
    if len(adapters) == 1 and _all_have(adapters[0], dtype):
        bias, a, b = adapters[0]
        return Stacked(a, b, bias)
    frame = Frame([adapters], adapters[0][1].new_empty(Frame.elements([adapters]), dtype=dtype))
    frame.fill([adapters])
    return frame.groups[0]


class Frame:
    """Where the stacks of several groups of layers lie in one buffer, and where each layer's tensors go.

    Args:
        groups: the adapters of the layers of each group; their shapes alone count.
        buffer: ``[elements(groups)]`` or longer.

    Attributes:
        groups: the stack of each group.
        members: those of each layer alone, group by group.
    """

    def __init__(self, groups: Sequence[Sequence[Adapter]], buffer: Tensor) -> None:
        self.buffer = buffer
        self.groups: list[Stacked] = []
        self.members: list[list[Stacked]] = []
        self.places: list[Tensor] = []
        self.gaps = False
        start = 0
        for adapters in groups:
            start = self._lay(adapters, start)

    @staticmethod
    def elements(groups: Sequence[Sequence[Adapter]]) -> int:
        """The elements that the stacks of these groups take in a buffer."""
        total = 0
        for adapters in groups:
            rank, rows, columns, bias = _sizes(adapters)
            total += _aligned(len(adapters) * rank * columns) + _aligned(rows * rank) + _aligned(rows if bias else 0)
        return total

    def _lay(self, adapters: Sequence[Adapter], start: int) -> int:
        """Lays a group out from element ``start`` on; returns where the next one starts."""
        rank, rows, columns, with_bias = _sizes(adapters)

        def take(*shape: int) -> Tensor:
            nonlocal start
            size = torch.Size(shape).numel()
            taken = self.buffer[start : start + size].view(shape)
            start += _aligned(size)
            return taken

        bias = None
        a, b = take(len(adapters) * rank, columns), take(rows, rank)
        if with_bias:
            bias = take(rows)
        whole, members, first = Stacked(a, b, bias), [], 0
        for place, (own_bias, own_a, own_b) in enumerate(adapters):
            stop = first + own_b.shape[0]
            member = whole.member(place, rank, first, stop)
            self.places += [member.a[: own_a.shape[0]], member.b[:, : own_a.shape[0]]]
            if own_bias is not None and member.bias is not None:
                self.places.append(member.bias)
            self.gaps |= own_a.shape[0] < rank or (with_bias and own_bias is None)
            members.append(member)
            first = stop
        self.groups.append(whole)
        self.members.append(members)
        return start

    def fill(self, groups: Sequence[Sequence[Adapter]]) -> None:
        """Copies the tensors of all layers to their places, in one launch where the device has one for it."""
        if self.gaps:
            self.buffer.zero_()
        sources = [
            tensor
            for adapters in groups
            for bias, a, b in adapters
            for tensor in ((a, b) if bias is None else (a, b, bias))
        ]
        torch._foreach_copy_(self.places, sources)


def _sizes(adapters: Sequence[Adapter]) -> tuple[int, int, int, bool]:
    """The sizes of a group: the largest rank, all rows together, the columns, and whether a layer has a bias."""
    rank = max(a.shape[0] for _, a, _ in adapters)
    rows = sum(b.shape[0] for *_, b in adapters)
    return rank, rows, adapters[0][1].shape[1], any(bias is not None for bias, *_ in adapters)


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _all_have(adapter: Adapter, dtype: torch.dtype) -> bool:
    return all(tensor is None or tensor.dtype == dtype for tensor in adapter)


def adapter_of(layer: nn.Module) -> Adapter:
    """The tensors of an adapted layer that are in place now."""
    own: Any = layer._parameters
    return own["bias"], own["lora_A"], own["lora_B"]


class AdapterBuffers:
    """The memory in which the blocks of a model stack their adapters: one buffer for each dtype, device and stream.

    One block's stacks are in use at a time, so the next block writes over them. So one thread has the buffers while it
    runs a block; blocks that other threads run meanwhile are not stacked.
    """

    def __init__(self) -> None:
        self._frames: dict[Any, Frame] = {}
        self._buffers: dict[Any, Tensor] = {}
        self._lock = threading.Lock()
        self._thread, self._passes = 0, 0  # the thread that has the buffers, and how many passes it is in

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterBuffers:
        """Buffers of their own, for a copy of the model."""
        made = memo[id(self)] = AdapterBuffers()
        return made

    def clear(self) -> None:
        """Gives the memory back."""
        self._frames, self._buffers = {}, {}

    def take(self) -> None:
        """Gives the buffers to this thread until ``give_back``, unless another thread has them."""
        with self._lock:
            if not self._passes:
                self._thread = threading.get_ident()
            self._passes += self.are_mine()

    def give_back(self) -> None:
        """Ends what ``take`` began."""
        with self._lock:
            self._passes -= self.are_mine() and self._passes > 0

    def are_mine(self) -> bool:
        """Whether this thread was the last one to get the buffers. Within a pass, it has them."""
        return self._thread == threading.get_ident()

    def frame(self, groups: Sequence[Sequence[Adapter]], dtype: torch.dtype) -> Frame:
        """The frame for groups of these shapes; blocks that are alike share it."""
        device = groups[0][0][1].device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        place = dtype, device, stream
        shapes = tuple([tuple([None if t is None else t.shape for one in group for t in one]) for group in groups])
        frame = self._frames.get((place, shapes))
        if frame is None:
            # Inference tensors could not be saved for a backward pass later.
            with torch.inference_mode(False), torch.no_grad():
                size, buffer = Frame.elements(groups), self._buffers.get(place)
                if buffer is None or buffer.numel() < size:
                    self._frames = {key: value for key, value in self._frames.items() if key[0] != place}
                    buffer = self._buffers[place] = torch.empty(size, dtype=dtype, device=device)
                frame = self._frames[place, shapes] = Frame(groups, buffer)
        return frame


class _Filled:
    """What a pass has stacked in one dtype, and the tensors of each layer as they were then."""

    def __init__(self, groups: Sequence[Sequence[nn.Module]], frame: Frame) -> None:
        self.frame = frame
        self.version = frame.buffer._version
        self.place_of = {group[0]: index for index, group in enumerate(groups)}
        self.seen = {
            layer: [None if tensor is None else (tensor, tensor._version) for tensor in adapter_of(layer)]
            for group in groups
            for layer in group
        }

    def holds(self, layer: nn.Module) -> bool:
        """Whether the stack still is what the layer's tensors are, and nothing else was written over it."""
        unchanged = self.frame.buffer._version == self.version
        return unchanged and all(map(_is_as, adapter_of(layer), self.seen[layer]))


def _is_as(tensor: Tensor | None, seen: tuple[Tensor, int] | None) -> bool:
    """Whether ``tensor`` is, or shares the memory of, one that was seen, and was not changed since."""
    if tensor is None or seen is None:
        return tensor is seen
    if tensor is not seen[0] and (tensor.is_inference() or not same_memory(tensor, seen[0])):
        return False
    return tensor._version == seen[1]


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape begin at the same number of the same memory. Fake tensors have no address."""
    return (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.storage_offset() == other.storage_offset()
    )


class BlockAdapters:
    """The adapters of a block's layers, stacked once in every pass of the block, in one launch.

    While active, in a forward pass or in a recompute with its backward pass, the block's layers find it in their
    attribute ``stacks``. The first one that asks has the stacks of all made from what the parameters hold then. So a
    write to a parameter, by whatever means, holds from the next pass on.

    Args:
        groups: the block's adapted layers; those that are computed together are one group.
        buffers: where the stacks lie.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Module]], buffers: AdapterBuffers) -> None:
        self.groups = [tuple(group) for group in groups]
        self.buffers = buffers
        self._group_of = {layer: (group, place) for group in self.groups for place, layer in enumerate(group)}
        self._filled: dict[torch.dtype, _Filled | None] = {}

    def __enter__(self) -> None:
        self.buffers.take()
        for layer in self._group_of:
            vars(layer)["stacks"] = self  # as an attribute: ``Module.__setattr__`` would look through the parameters

    def __exit__(self, *_: Any) -> None:
        if self.buffers.are_mine():
            self._filled = {}
        self.buffers.give_back()
        for layer in self._group_of:
            vars(layer).pop("stacks", None)

    def stacked(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> Stacked | None:
        """The stack of a group's layers, or of one layer; None if it must be made of the layers' own tensors.

        That is so for a layer alone whose tensors have the dtype, where a tensor was changed within the pass, and where
        another thread runs a block.
        """
        if not self.buffers.are_mine():
            return None
        group, place = self._group_of[layers[0]]
        if dtype not in self._filled:
            self._filled[dtype] = self._fill(dtype)
        filled = self._filled[dtype]
        if filled is None or group[0] not in filled.place_of or not all(map(filled.holds, layers)):
            return None
        index = filled.place_of[group[0]]
        if len(layers) > 1:
            return filled.frame.groups[index] if tuple(layers) == group else None
        return filled.frame.members[index][place]

    @torch.no_grad()
    def _fill(self, dtype: torch.dtype) -> _Filled | None:
        """Stacks all groups that need it; None if none does."""
        adapters = [[adapter_of(layer) for layer in group] for group in self.groups]
        needed = [index for index, one in enumerate(adapters) if len(one) > 1 or not _all_have(one[0], dtype)]
        wanted = [adapters[index] for index in needed]
        # Inference tensors do not count their changes, so one in between would not be seen.
        if not wanted or any(t is not None and t.is_inference() for group in wanted for one in group for t in one):
            return None
        frame = self.buffers.frame(wanted, dtype)
        frame.fill(wanted)
        return _Filled([self.groups[index] for index in needed], frame)
