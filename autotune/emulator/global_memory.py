"""Global memory of a launch, and what a kernel must not do with it.

An access outside of every tensor, or to the gaps of a strided one, is a fault, as is a misaligned one, a read of what
another thread has written in this launch, and two threads that write different values to one place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .bit_operations import UNSIGNED
from .faults import Fault, NotModelled
from .floats import U64, Array

# The first address of the arena, and the bytes between two buffers.
BASE = 0x7F40_0000_0000
GAP = 4096
# Bytes that no store splits: writers are noted for each of these units.
UNIT = 2
UNWRITTEN = 0xCD
WORDS = {bits // 8: kind for bits, kind in UNSIGNED.items()}
Mask = Array | None


@dataclass
class Buffer:
    """Bytes of global memory: their name, the address that a kernel sees, and their place in the arena."""

    name: str
    address: int
    offset: int
    data: Array


class GlobalMemory:
    """All buffers of a launch in one array of bytes, the arena, with gaps between them.

    ``add`` copies a buffer in, and ``fetch`` copies all back after the launch. ``ready`` must be called in between.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._size = GAP
        self._allowed: list[tuple[int, Array]] = []
        # The first address of each piece whose addresses are its own, and their distance from the arena's.
        self._pieces: tuple[Array, Array] | None = None

    def add(self, name: str, data: Array, allowed: Array, misalignment: int = 0) -> Buffer:
        """Adds ``data`` (uint8) at an address that is ``misalignment`` more than a multiple of 256.

        ``allowed`` holds a bool for each byte: whether a kernel may touch it.
        """
        return self._add(name, data, allowed, misalignment, None)

    def add_at(self, name: str, data: Array, address: int) -> Buffer:
        """Adds a piece of a storage too large to copy, at an address of its own beyond those of ``add``."""
        return self._add(name, data, np.ones(len(data), dtype=bool), address % 256, address)

    def _add(self, name: str, data: Array, allowed: Array, misalignment: int, address: int | None) -> Buffer:
        offset = -(-self._size // 256) * 256 + misalignment
        buffer = Buffer(name, BASE + offset if address is None else address, offset, data)
        self.buffers.append(buffer)
        self._allowed.append((offset, allowed))
        self._size = offset + len(data) + GAP
        return buffer

    def ready(self) -> None:
        """Copies all buffers into the arena. Nothing can be added after it."""
        size = -(-self._size // 256) * 256
        self.bytes = np.full(size, UNWRITTEN, dtype=np.uint8)
        allowed = np.zeros(size, dtype=bool)
        for buffer, (offset, may) in zip(self.buffers, self._allowed, strict=True):
            self.bytes[offset : offset + len(buffer.data)] = buffer.data
            allowed[offset : offset + len(may)] = may
        # How many of the bytes before each one may not be touched.
        self.forbidden = np.concatenate(([0], np.cumsum(~allowed, dtype=np.int32)))
        self.views = {width: self.bytes.view(kind) for width, kind in WORDS.items()}
        # The thread that wrote each unit, counted from 1; empty until the first store.
        self.writers = np.zeros(0, dtype=np.int32)
        self._note_pieces([one for one in self.buffers if one.address != BASE + one.offset])

    def _note_pieces(self, apart: list[Buffer]) -> None:
        """Notes where addresses of their own begin: some bytes before each piece, which are then out of its bounds."""
        starts, shifts, end = [0], [BASE], 0
        for one in sorted(apart, key=lambda one: one.address):
            starts.append(max(end, one.address - GAP // 2))
            shifts.append(one.address - one.offset)
            end = one.address + len(one.data)
        if apart:
            self._pieces = np.array(starts, dtype=U64), np.array(shifts, dtype=U64)

    def fetch(self) -> None:
        """Copies every buffer back to where it came from."""
        for buffer in self.buffers:
            buffer.data[:] = self.bytes[buffer.offset : buffer.offset + len(buffer.data)]

    def place(self, addresses: Array, width: int, mask: Mask) -> Array:
        """Checks an access of ``width`` bytes; gives the offsets into the arena, 0 for masked threads."""
        if self._pieces is None:
            shifts: Array | np.uint64 = U64(BASE)
        else:
            starts, distances = self._pieces
            shifts = distances[np.searchsorted(starts, addresses, side="right") - 1]
        offsets = (addresses - shifts).view(np.int64)
        if mask is not None:
            offsets = np.where(mask, offsets, 0)
        bad = (offsets < 0) | (offsets > len(self.bytes) - width)
        if not bad.any():
            bad = self.forbidden[offsets + width] != self.forbidden[offsets]
        self._complain("out of bounds", addresses, bad, mask, width)
        self._complain("misaligned", addresses, (offsets & (width - 1)) != 0, mask, width)
        return offsets

    def _complain(self, kind: str, addresses: Array, bad: Array, mask: Mask, width: int, more: str = "") -> None:
        """Raises a fault if any thread of the mask is bad, and describes the first one."""
        if mask is not None:
            bad = bad & mask
        if not bad.any():
            return
        bad = np.broadcast_to(bad, np.broadcast_shapes(bad.shape, addresses.shape))
        block, thread = (int(index) for index in np.argwhere(bad)[0])
        address = int(np.broadcast_to(addresses, bad.shape)[block, thread])
        near = "memory"
        if self.buffers:
            # The buffer whose start or end is nearest.
            ends = [(one.address, one.address + len(one.data)) for one in self.buffers]
            distances = [min(abs(address - first), abs(address - stop)) for first, stop in ends]
            one = self.buffers[int(np.argmin(distances))]
            near = f"{one.name}{address - one.address:+d} (of {len(one.data)} bytes)"
        where = f"block #{block}, thread {thread}, {width} bytes at {near}"
        raise Fault(kind, f"{int(bad.sum())} threads; the first: {where}{more}")

    def load(self, offsets: Array, width: int, count: int) -> list[Array]:
        """Reads ``count`` words of ``width`` bytes from each offset."""
        view = self.views[width]
        if count == 1:
            return [view[offsets // width]]
        rows = view.reshape(-1, count)[offsets // (width * count)]
        return [rows[..., part] for part in range(count)]

    def check_read(self, offsets: Array, width: int, who: Array, mask: Mask) -> None:
        """Raises if another thread has written the first or the last of these bytes in this launch."""
        if not len(self.writers):
            return
        for at in (offsets, offsets + (width - 1)):
            writers = self.writers[at // UNIT]
            bad = (writers != 0) & (writers != who + 1)
            addresses = (offsets + BASE).astype(U64)
            self._complain("global race", addresses, bad, mask, width, ", written by another thread")

    def store(self, offsets: Array, values: list[Array], width: int, who: Array, mask: Mask) -> None:
        """Writes words of ``width`` bytes; ``who`` numbers the threads of all blocks."""
        if width < UNIT:
            raise NotModelled("stores of single bytes to global memory are not modelled")
        if not len(self.writers):
            self.writers = np.zeros(len(self.bytes) // UNIT, dtype=np.int32)
        shape = np.broadcast_shapes(offsets.shape, who.shape, *(value.shape for value in values))
        chosen = slice(None) if mask is None else np.broadcast_to(mask, shape)
        at = np.broadcast_to(offsets, shape)[chosen].ravel()
        threads = np.broadcast_to(who, shape)[chosen].ravel().astype(np.int32) + 1
        for part, value in enumerate(values):
            data = np.broadcast_to(value, shape)[chosen].ravel().astype(WORDS[width])
            place = at + part * width
            old = self.writers[place // UNIT]
            different = (old != 0) & (old != threads) & (self.views[width][place // width] != data)
            if different.any():
                raise Fault("global race", f"{int(different.sum())} words written differently by two threads")
            self.views[width][place // width] = data
            if (self.views[width][place // width] != data).any():
                raise Fault("global race", "one instruction writes different values to one word")
            for unit in range(width // UNIT):
                self.writers[place // UNIT + unit] = threads
