"""AdamW's two moments of every parameter, group by group: on the device, in host memory, or in a mapped file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mebp_triton.system.pinned import host_bytes
from mebp_triton.system.scratch import MappedSlot, ScratchFile

from .dynamic8 import decode, encode, encoded_bytes
from .residency import Residency, check_residency
from .side_copies import Copy, SideCopies, Streams, side_streams

SIGNED = (True, False)  # the first moment is signed, the second never negative


class Moments:
    """The moments of all parameters, zeros at first.

    They are kept in float32 (float64 for float64 parameters), whatever the parameters' dtype, or in 8 bits.

    Args:
        groups: parameters, group by group.
        residency: where the moments lie while their group is not open.
        directory: where residency "file" puts its file.
        eight_bit: keep them as ``dynamic8`` does, in a quarter of the memory; decoded while their group is open.
        streams: makes the streams of a device on which moments in host memory come and go beside the computation; None
            where the host copies.

    Attributes:
        resident: whether they lie on the device as they are computed, so that all groups may be open at once.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        residency: Residency,
        directory: Path,
        eight_bit: bool = False,
        streams: Callable[[torch.device], Streams | None] = side_streams,
    ) -> None:
        check_residency("optimizer state", residency)
        self.groups = [list(group) for group in groups]
        self.eight_bit = eight_bit
        self.resident = residency == "device" and not eight_bit
        self._coming: dict[int, Copy] = {}
        self._views: list[tuple[list[Tensor], list[Tensor]] | None] = [None] * len(self.groups)
        self.slots: list[MappedSlot] = []
        self.buffers: list[Tensor] = []
        scratch = ScratchFile(directory) if residency == "file" else None
        for group in self.groups:
            dtype = torch.uint8 if eight_bit else _computed_dtype(group)
            size = sum(parameter.numel() for parameter in group)
            count = 2 * (encoded_bytes(size) if eight_bit else size)
            if scratch is not None:
                slot = scratch.mapped_slot(count * dtype.itemsize)  # a new file reads as zeros
                self.slots.append(slot)
                self.buffers.append(slot.bytes.view(dtype))
            else:
                device = group[0].device if group else torch.device("cpu")
                if residency == "host":
                    self.buffers.append(host_bytes(count * dtype.itemsize, device).view(dtype))
                else:
                    self.buffers.append(torch.zeros(count, dtype=dtype, device=device))
        on_host = {group[0].device for group in self.groups if group} if residency == "host" else ()
        made = {device: streams(device) for device in on_host}
        self.sides = {device: SideCopies(found) for device, found in made.items() if found is not None}

    def prefetch(self, indices: Collection[int]) -> None:
        """Starts to bring the moments of some groups, which are opened next. What was brought of others is given up."""
        if not self.sides:
            return
        brought, self._coming = self._coming, {}
        for index in indices:
            side = self._side(index)
            if side is not None:
                self._coming[index] = brought.get(index) or side.bring(self.buffers[index], self._device(index))

    def _device(self, index: int) -> torch.device:
        group = self.groups[index]
        return group[0].device if group else self.buffers[index].device

    def _side(self, index: int) -> SideCopies | None:
        return self.sides.get(self._device(index))

    @contextmanager
    def open(self, index: int, changes: bool = True) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """While active, a group's moments are at hand; with ``changes``, what was changed is kept.

        Yields:
            The first and the second moments, shaped as the parameters and on their device.
        """
        if self.resident:
            views = self._views[index]
            if views is None:
                views = self._views[index] = self._shaped(index, self._halves(self.buffers[index]))
            yield views
            return
        group, buffer, side = self.groups[index], self.buffers[index], self._side(index)
        if side is None:
            stored = buffer.to(self._device(index))
        else:
            coming = self._coming.pop(index, None)
            stored = side.take(coming or side.bring(buffer, self._device(index)))
        halves = self._halves(stored)
        working = halves
        if self.eight_bit:
            wide, count = _computed_dtype(group), sum(parameter.numel() for parameter in group)
            working = tuple(decode(half, count, signed, wide) for half, signed in zip(halves, SIGNED, strict=True))
        try:
            yield self._shaped(index, working)
        finally:
            if changes and self.eight_bit:
                for moment, half, signed in zip(working, halves, SIGNED, strict=True):
                    encode(moment, half, signed)
            if changes and side is not None:
                self._coming.pop(index, None)  # it would be what the moments were before
                side.send(stored, buffer)
            elif changes and stored is not buffer:
                buffer.copy_(stored)
            self.drop(index)

    @staticmethod
    def _halves(buffer: Tensor) -> tuple[Tensor, ...]:
        return buffer.view(2, buffer.numel() // 2).unbind()

    def _shaped(self, index: int, moments: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The first and the second moments of a group, shaped as its parameters."""
        group = self.groups[index]
        sizes = [parameter.numel() for parameter in group]
        first, second = (
            [piece.view(parameter.shape) for piece, parameter in zip(moment.split(sizes), group, strict=True)]
            for moment in moments
        )
        return first, second

    def settle(self, index: int) -> None:
        """Waits until a group's moments can be read and written by the host: copies of them may be under way."""
        side = self._side(index)
        if side is not None:
            self._coming.clear()
            side.settle()

    def drop(self, index: int) -> None:
        """Gives back the resident pages of a group's moments, where they lie in a file."""
        if self.slots:
            self.slots[index].drop()


def _computed_dtype(group: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which a group's moments are computed."""
    return torch.float64 if any(parameter.dtype == torch.float64 for parameter in group) else torch.float32
