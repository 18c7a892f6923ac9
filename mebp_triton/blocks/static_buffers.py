"""Memory that stays where it is, and copies into it: what a captured graph reads and writes.

A copy is one launch for all tensors of one dtype.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from mebp_triton.layers.stacked_adapters import AdapterBuffers

Copy = Callable[[list[Tensor], list[Tensor]], Any]  # copies each of the second list into its place in the first


def layout_of(tensor: Tensor) -> Hashable:
    """What a buffer and a tensor that is copied into it have in common."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def has_buffer(tensor: Tensor) -> bool:
    """Whether a buffer of this layout can be written.

    Elements may share memory only along whole axes, as those of ``expand`` do.
    """
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    axes = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    reach = 0  # the last element that the axes so far reach
    for stride, size in axes:
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _without_repeats(tensor: Tensor) -> Tensor:
    """``tensor`` with one entry along each axis that repeats the same memory."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory of the same layout, stride by stride."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


class StaticBuffer:
    """Memory for tensors of one layout.

    Args:
        like: a tensor of that layout.
    """

    def __init__(self, like: Tensor) -> None:
        self.tensor = empty_like(like)
        self._source: weakref.ref[Tensor] | None = None
        self._version = -1

    def holds(self, source: Tensor) -> bool:
        """Whether ``source`` was copied last and has not been written to since; ``.data`` is not seen."""
        if self._source is None or self._source() is not source or source.is_inference():
            return False
        return self._version == source._version

    def note(self, source: Tensor) -> None:
        """Takes note that ``source`` is what was copied last."""
        self._source = weakref.ref(source)
        self._version = -1 if source.is_inference() else source._version


class StaticBuffers:
    """The buffers that graphs share: one for each role and layout, for as long as a graph uses it.

    Graphs run one after the other, and what a graph reads is copied in before each of its runs, so they can share.

    Args:
        copy: copies one list of tensors into another; the lists have one dtype.
    """

    def __init__(self, copy: Copy = torch._foreach_copy_) -> None:
        self._copy = copy
        self._made: weakref.WeakValueDictionary[Hashable, StaticBuffer] = weakref.WeakValueDictionary()
        self._stacks: weakref.WeakValueDictionary[Hashable, AdapterBuffers] = weakref.WeakValueDictionary()

    def get(self, role: Hashable, like: Tensor) -> StaticBuffer:
        """The buffer for tensors of the layout of ``like`` that have ``role``."""
        key = role, layout_of(like)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = StaticBuffer(like)
        return made

    def stacks(self, tensors: Iterable[Tensor]) -> AdapterBuffers:
        """Where the adapters among the parameters and buffers ``tensors`` of a block are stacked.

        Blocks of other layouts have another place: stacks that need more memory would move.
        """
        key = tuple(map(layout_of, tensors))
        made = self._stacks.get(key)
        if made is None:
            made = self._stacks[key] = AdapterBuffers()
        return made

    def fill(self, pairs: Iterable[tuple[StaticBuffer, Tensor]]) -> None:
        """Copies tensors into buffers."""
        taken = list(pairs)
        self.copy([buffer.tensor for buffer, _ in taken], [source for _, source in taken])
        for buffer, source in taken:
            buffer.note(source)

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Copies tensors into others of the same layouts, with one call for each dtype."""
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for target, source in zip(targets, sources, strict=True):
            lists = by_dtype.setdefault(target.dtype, ([], []))
            lists[0].append(_without_repeats(target))
            lists[1].append(_without_repeats(source))
        with torch.no_grad():
            for target_list, source_list in by_dtype.values():
                self._copy(target_list, source_list)

    def copies(self, buffers: list[StaticBuffer]) -> list[Tensor]:
        """What lies in ``buffers``, in memory of its own."""
        made = [empty_like(buffer.tensor) for buffer in buffers]
        self.copy(made, [buffer.tensor for buffer in buffers])
        return made

    def nbytes(self) -> int:
        """Bytes of all buffers that are in use."""
        return sum(buffer.tensor.untyped_storage().nbytes() for buffer in list(self._made.values()))
