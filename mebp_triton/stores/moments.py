"""AdamW's two moments of every parameter, group by group: on the device, in host memory, or in a memory-mapped file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mebp_triton.files import MappedSlot, ScratchFile

from .checkpoints import RESIDENCIES, Residency


class Moments:
    """Zeros at first. Kept in float32 (float64 for float64 parameters), whatever the parameters' dtype.

    Args:
        groups: parameters, group by group.
        residency: where the moments lie while their group is not open.
        directory: where residency "file" puts its file.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], residency: Residency, directory: Path) -> None:
        if residency not in RESIDENCIES:
            raise ValueError(f"optimizer state must be one of {', '.join(RESIDENCIES)}, got {residency!r}")
        self.groups = [list(group) for group in groups]
        self.slots: list[MappedSlot] | None = None
        self.buffers: list[Tensor] = []
        scratch = ScratchFile(directory) if residency == "file" else None
        self.slots = [] if scratch is not None else None
        for group in self.groups:
            dtype = torch.float64 if any(p.dtype == torch.float64 for p in group) else torch.float32
            count = 2 * sum(parameter.numel() for parameter in group)
            if scratch is not None and self.slots is not None:
                slot = scratch.mapped_slot(count * dtype.itemsize)  # a new file reads as zeros
                self.slots.append(slot)
                self.buffers.append(slot.bytes.view(dtype))
            else:
                device = group[0].device if group and residency == "device" else "cpu"
                self.buffers.append(torch.zeros(count, dtype=dtype, device=device))

    @contextmanager
    def open(self, index: int, changes: bool = True) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """First and second moments of a group, shaped as its parameters and on their device; ``changes`` are kept."""
        group, buffer = self.groups[index], self.buffers[index]
        device = group[0].device if group else buffer.device
        working = buffer if buffer.device == device else buffer.to(device)
        pieces = working.split([parameter.numel() for parameter in group] * 2)
        shaped = [piece.view(parameter.shape) for piece, parameter in zip(pieces, group * 2, strict=True)]
        try:
            yield shaped[: len(group)], shaped[len(group) :]
        finally:
            if working is not buffer and changes:
                buffer.copy_(working)
            self.drop(index)

    def drop(self, index: int) -> None:
        """Gives back the resident pages of a group's moments, where they lie in a file."""
        if self.slots is not None:
            self.slots[index].drop()
