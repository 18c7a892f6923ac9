"""Shared memory of all blocks, and the races in it.

Blocks run in lockstep here, so a missing barrier would never change a result. Races are found by stamps instead. Every
byte keeps who wrote it last, who has read it, and when; the time goes on at every barrier. A thread may read what it
wrote itself, what was written before the block's last barrier, and what its own warp wrote before the warp's last
barrier. It may overwrite on the same terms. The target of an asynchronous copy may be touched by the copying thread
once it has waited for the copy, and by others after a barrier behind that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .faults import Fault
from .floats import U32, Array
from .global_memory import UNWRITTEN, WORDS

WARP = 32
# Special stamps, larger than any other: nobody wrote it; an asynchronous access is on its way.
NEVER, IN_FLIGHT = U32(0xFFFF_FFFF), U32(0xFFFF_FFFE)
Mask = Array | None


@dataclass
class Copy:
    """An asynchronous copy on its way: its target, its threads, its group, and the blocks where it has not arrived."""

    offsets: Array
    width: int
    who: Array
    mask: Mask
    group: Array
    alive: Array


class SharedMemory:
    """The shared memory of all blocks, ``[blocks, bytes]``, filled with garbage at the start.

    Offsets, masks and ``who`` (the thread within its block) are ``[blocks or 1, threads]``. While all blocks do the
    same, the stamps of one block stand for all.

    Args:
        blocks: how many.
        start, end: the offsets that a block may touch; ``end`` is behind the last one.
        threads: threads of a block.
        unit: bytes that no write splits; stamps are kept for each of these units.
    """

    def __init__(self, blocks: int, start: int, end: int, threads: int, unit: int) -> None:
        self.blocks, self.start, self.end, self.threads, self.unit = blocks, start, end, threads, unit
        rounded = max(16, -(-end // 16) * 16)
        self.bytes = np.full((blocks, rounded), UNWRITTEN, dtype=np.uint8)
        self.views = {width: self.bytes.view(kind) for width, kind in WORDS.items()}
        units = rounded // unit
        self.writer = np.full((1, units), NEVER, dtype=U32)
        self.reader = np.zeros((1, units), dtype=U32)
        # Written, and not yet fenced for matrix instructions that read asynchronously.
        self.unfenced = np.zeros((1, units), dtype=bool)
        # The time, and when the last barrier of the block and of its warps was.
        self.now, self.since, self.warps_since = (np.ones((1, 1), dtype=U32) for _ in range(3))
        # A stamp is time * span + who: a thread; ``several``, for threads of several warps; or, behind that, a warp
        # of which several threads did it.
        self.several = U32(threads)
        self.span = U32(threads + 1 + threads // WARP)
        self.copies: list[Copy] = []
        self.groups = np.zeros((1, 1), dtype=np.int32)

    # Stamps.

    def _own(self, who: Array) -> Array:
        """The stamp of these threads, now: ``[blocks or 1, threads, 1]``."""
        return (self.now * self.span + who.astype(U32))[..., None]

    def _warp_of(self, stamps: Array) -> Array:
        """The warp that did it; -1 for several."""
        who = (stamps % self.span).astype(np.int64)
        return np.where(who < self.threads, who // WARP, who - self.threads - 1)

    def _too_early(self, stamps: Array, who: Array) -> Array:
        """Whether another thread did it with no barrier since: the block's or, within a warp, the warp's."""
        bad = (stamps >= (self.since * self.span)[..., None]) & (stamps != self._own(who))
        if bad.any() and (self.warps_since > self.since).any():
            before_the_warps = stamps < (self.warps_since * self.span)[..., None]
            bad &= ~(before_the_warps & (self._warp_of(stamps) == who[..., None] // WARP))
        return bad

    def _spread(self) -> None:
        """Gives every block its own stamps, from when blocks do different things."""
        if self.writer.shape[0] != self.blocks:
            for name in ("writer", "reader", "unfenced", "now", "since", "warps_since"):
                setattr(self, name, np.repeat(getattr(self, name), self.blocks, axis=0))

    def _units(self, offsets: Array, width: int, mask: Mask) -> tuple[Array, Array]:
        """The stamps of an access, as an index of rows and units: ``[blocks or 1, threads, units]`` each."""
        if offsets.shape[0] != 1 or (mask is not None and mask.shape[0] != 1):
            self._spread()
        units = offsets[..., None] // self.unit + np.arange(max(1, width // self.unit))
        return np.arange(self.writer.shape[0])[:, None, None], units

    # Accesses.

    def place(self, offsets: Array, width: int, mask: Mask) -> Array:
        """Checks an access of ``width`` bytes; gives int64 offsets, those of masked threads at the start."""
        offsets = offsets.astype(np.int64)
        if mask is not None:
            offsets = np.where(mask, offsets, self.start)
        for kind, bad in (
            ("out of bounds", (offsets < self.start) | (offsets + width > self.end)),
            ("misaligned", (offsets & (width - 1)) != 0),
        ):
            if bad.any():
                found = int(offsets[bad][0]) - self.start
                raise Fault(kind, f"{width} bytes at {found} of {self.end - self.start} bytes of shared memory")
        return offsets

    def read(self, offsets: Array, width: int, who: Array, mask: Mask) -> None:
        """Notes a read of ``width`` bytes; raises for one that comes too early."""
        rows, units = self._units(offsets, width, mask)
        found = self.writer[rows, units]
        bad = self._too_early(found, who)
        if mask is not None:
            bad = bad & mask[..., None]
        if bad.any():
            self._explain("read", found, bad, units)
        own, warp = self._own(who), (who // U32(WARP))[..., None]
        # A byte that another thread has read as well gets the stamp of its warp or, if that differs, of several.
        of_warp = own - who[..., None] + U32(self.threads + 1) + warp
        of_several = own - who[..., None] + self.several
        old = self.reader[rows, units]
        mine = own
        shared = (old >= (self.since * self.span)[..., None]) & (old != own)
        if shared.any():
            mine = np.where(shared, np.where(self._warp_of(old) == warp, of_warp, of_several), own)
        rows, units, mine, of_warp, of_several, warp = _chosen(mask, rows, units, mine, of_warp, of_several, warp)
        self.reader[rows, units] = mine
        # Threads of this instruction that read one byte: the last one's stamp is there, and the others see it.
        last = self.reader[rows, units]
        clash = last != mine
        if clash.any():
            rows, units, warp, last = rows[clash], units[clash], warp[clash], last[clash]
            self.reader[rows, units] = of_warp[clash]
            apart = self._warp_of(last) != warp
            self.reader[rows[apart], units[apart]] = of_several[clash][apart]

    def write(self, offsets: Array, width: int, who: Array, mask: Mask, stamp: np.uint32 | None = None) -> bool:
        """Notes a write; raises for one that comes too early.

        Args:
            stamp: IN_FLIGHT for the start of an asynchronous copy.

        Returns:
            Whether several threads write the same byte.
        """
        rows, units = self._units(offsets, width, mask)
        found, read = self.writer[rows, units], self.reader[rows, units]
        bad, bad_read = self._too_early(found, who) & (found != NEVER), self._too_early(read, who)
        if mask is not None:
            bad, bad_read = bad & mask[..., None], bad_read & mask[..., None]
        if bad.any():
            self._explain("write over", found, bad, units)
        if bad_read.any():
            self._explain("write after read of", read, bad_read, units)
        own = self._own(who)
        mine = np.broadcast_to(own, np.broadcast_shapes(own.shape, units.shape, (1, who.shape[1], 1)))
        rows, units, mine = _chosen(mask, rows, units, mine)
        self.writer[rows, units] = mine
        self.unfenced[rows, units] = True
        twice = bool((self.writer[rows, units] != mine).any())
        if stamp is not None:
            self.writer[rows, units] = stamp
        return twice

    def _explain(self, action: str, stamps: Array, bad: Array, units: Array) -> None:
        """Raises the fault of an access that came too early."""
        stamps, bad, units = np.broadcast_arrays(stamps, bad, units)
        block, thread, part = (int(index) for index in np.argwhere(bad)[0])
        stamp = stamps[block, thread, part]
        many = f"{int(bad.any(axis=-1).sum())} threads"
        place = f"{many}; the first: block #{block}, thread {thread}, {action} byte "
        place += str(int(units[block, thread, part]) * self.unit)
        if stamp == NEVER:
            raise Fault("uninitialised", f"{place} that nobody wrote")
        if stamp == IN_FLIGHT:
            raise Fault("shared race", f"{place} while an asynchronous access to it is on its way")
        other = int(stamp) % int(self.span)
        name = f"thread {other}" if other < self.threads else "several threads"
        raise Fault("shared race", f"{place}: {name} was there with no barrier in between")

    def barrier(self, mask: Mask, warps_only: bool = False) -> None:
        """Lets the time go on, for the blocks of the mask."""
        if mask is None:
            self.now = self.now + U32(1)
            self.warps_since = self.now
            if not warps_only:
                self.since = self.now
            return
        self._spread()
        self.now = self.now + mask.astype(U32)
        self.warps_since = np.where(mask, self.now, self.warps_since)
        if not warps_only:
            self.since = np.where(mask, self.now, self.since)

    # Asynchronous copies.

    def start_copy(self, offsets: Array, width: int, who: Array, mask: Mask) -> bool:
        """Notes the start of a copy to shared memory; its target is nobody's until the copy has arrived.

        Returns:
            Whether several threads copy to the same byte.
        """
        twice = self.write(offsets, width, who, mask, IN_FLIGHT)
        alive = np.ones((1, 1), dtype=bool) if mask is None else np.any(mask, axis=1, keepdims=True)
        self.copies.append(Copy(offsets, width, who, mask, self.groups.copy(), alive))
        return twice

    def commit(self, mask: Mask) -> None:
        """Ends a group of copies."""
        self.groups = self.groups + (1 if mask is None else mask.any(axis=1, keepdims=True).astype(np.int32))

    def wait(self, pending: int, mask: Mask) -> None:
        """Lets all groups but the last ``pending`` ones arrive, in the blocks of the mask."""
        left = []
        for copy in self.copies:
            done = (copy.group < self.groups - pending) & copy.alive
            if mask is not None:
                done = done & mask.any(axis=1, keepdims=True)
            if done.any():
                arrived = copy.mask
                if not done.all():
                    arrived = done if arrived is None else arrived & done
                self._arrive(copy, arrived)
                copy.alive = copy.alive & ~done
            if copy.alive.any():
                left.append(copy)
        self.copies = left

    def _arrive(self, copy: Copy, mask: Mask) -> None:
        rows, units = self._units(copy.offsets, copy.width, mask)
        rows, units, own = _chosen(mask, rows, units, self._own(copy.who))
        self.writer[rows, units] = own

    # Matrix instructions that read asynchronously.

    def fence(self, mask: Mask) -> None:
        """Makes what was written visible to asynchronous readers, in the blocks of the mask."""
        if mask is None:
            self.unfenced[:] = False
        else:
            self._spread()
            self.unfenced[np.broadcast_to(mask.any(axis=1), (self.blocks,))] = False

    def start_read(self, offsets: Array, width: int, who: Array, mask: Mask) -> None:
        """Notes an asynchronous read: as ``read``, and nobody may write there until ``end_read``."""
        self.read(offsets, width, who, mask)
        rows, units = _chosen(mask, *self._units(offsets, width, mask))
        if self.unfenced[rows, units].any():
            raise Fault("shared race", "an asynchronous read of what was written with no proxy fence since")
        self.reader[rows, units] = IN_FLIGHT

    def keep_read(self, offsets: Array, width: int, mask: Mask) -> None:
        """Notes that an asynchronous read has not ended."""
        rows, units = _chosen(mask, *self._units(offsets, width, mask))
        self.reader[rows, units] = IN_FLIGHT

    def end_read(self, offsets: Array, width: int, mask: Mask) -> None:
        """Makes an asynchronous read one that several threads have done now."""
        rows, units = self._units(offsets, width, mask)
        rows, units, stamps = _chosen(mask, rows, units, (self.now * self.span + self.several)[..., None])
        self.reader[rows, units] = stamps

    # Data.

    def load(self, offsets: Array, width: int, count: int) -> list[Array]:
        """Reads ``count`` words of ``width`` bytes from each offset."""
        view: Array = self.views[width]
        if count > 1:
            view = view.reshape(self.blocks, -1, count)
        places = offsets // (width * count)
        found = view[:, places[0]] if offsets.shape[0] == 1 else view[np.arange(self.blocks)[:, None], places]
        return [found] if count == 1 else [found[..., part] for part in range(count)]

    def store(self, offsets: Array, values: list[Array], width: int, mask: Mask, twice: bool = False) -> None:
        """Writes words of ``width`` bytes.

        twice: several threads write the same bytes, which is a fault unless they write the same values.
        """
        shape = np.broadcast_shapes((self.blocks, 1), offsets.shape, *(value.shape for value in values))
        view = self.views[width]
        for part, value in enumerate(values):
            places = offsets // width + part
            value = value.astype(WORDS[width])
            if mask is None and offsets.shape == (1, value.shape[1]) and not twice:
                view[:, places[0]] = value
                continue
            rows = np.broadcast_to(np.arange(self.blocks)[:, None], shape)
            places, value = np.broadcast_to(places, shape), np.broadcast_to(value, shape)
            keep = slice(None) if mask is None else np.broadcast_to(mask, shape)
            rows, places, value = rows[keep], places[keep], value[keep]
            view[rows, places] = value
            if twice and (view[rows, places] != value).any():
                raise Fault("shared race", "one instruction writes different values to one word")


def _chosen(mask: Mask, *arrays: Array) -> tuple[Array, ...]:
    """Broadcasts arrays ``[blocks or 1, threads, units]`` to one shape; with a mask, flattens what it lets through."""
    arrays = np.broadcast_arrays(*arrays)
    if mask is None:
        return tuple(arrays)
    keep = np.broadcast_to(mask[..., None], arrays[0].shape)
    return tuple(one[keep] for one in arrays)
