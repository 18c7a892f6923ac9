"""AdamW's two moments of every parameter, group by group: on the device, in host memory, or in a mapped file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mebp_triton.system.pinned import host_bytes
from mebp_triton.system.scratch import MappedSlot, ScratchFile

from .dynamic8 import decode, encode, encoded_bytes
from .residency import Residency, check_residency

SIGNED = (True, False)  # the first moment is signed, the second never negative


class Moments:
    """The moments of all parameters, zeros at first.

    They are kept in float32 (float64 for float64 parameters), whatever the parameters' dtype, or in 8 bits.

    Args:
        groups: parameters, group by group.
        residency: where the moments lie while their group is not open.
        directory: where residency "file" puts its file.
        eight_bit: keep them as ``dynamic8`` does, in a quarter of the memory; decoded while their group is open.

    Attributes:
        resident: whether they lie on the device as they are computed, so that all groups may be open at once.
        on_host: whether they lie in host memory, to and from which a GPU copies them while the host goes on.
    """

    def __init__(
        self, groups: Sequence[Sequence[Tensor]], residency: Residency, directory: Path, eight_bit: bool = False
    ) -> None:
        check_residency("optimizer state", residency)
        self.groups = [list(group) for group in groups]
        self.eight_bit = eight_bit
        self.resident = residency == "device" and not eight_bit
        self.on_host = residency == "host"
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
                if self.on_host:
                    self.buffers.append(host_bytes(count * dtype.itemsize, device).view(dtype))
                else:
                    self.buffers.append(torch.zeros(count, dtype=dtype, device=device))

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
        group, buffer = self.groups[index], self.buffers[index]
        device = group[0].device if group else buffer.device
        stored = buffer if buffer.device == device else buffer.to(device, non_blocking=self.on_host)
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
            if changes and stored is not buffer:
                buffer.copy_(stored, non_blocking=self.on_host)
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
        if self.on_host and self.groups[index] and self.groups[index][0].is_cuda:
            torch.cuda.synchronize(self.groups[index][0].device)

    def drop(self, index: int) -> None:
        """Gives back the resident pages of a group's moments, where they lie in a file."""
        if self.slots:
            self.slots[index].drop()


def _computed_dtype(group: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which a group's moments are computed."""
    return torch.float64 if any(parameter.dtype == torch.float64 for parameter in group) else torch.float32
