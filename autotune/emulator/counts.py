"""Counts of an execution: instructions by class, sectors of global memory, wavefronts of shared memory.

Numbers are those of warps, as the hardware issues them. PTX is not machine code, which moves registers, computes
addresses and loads constants in fewer or more instructions than are counted here. Memory accesses, barriers and matrix
instructions are the same in both. Reads by ``wgmma`` are not counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .floats import Array
from .parser import Instruction, Kernel

WARP = 32
# Bytes that global memory gives at once; banks of shared memory, of four bytes each.
SECTOR = 32
BANKS = 32
# The first word of an instruction, or more of it, and its class.
CLASSES = {
    "mma": "matrix",
    "wgmma.mma_async": "matrix",
    "wgmma": "asynchronous control",
    "ldmatrix": "ldmatrix",
    "stmatrix": "stmatrix",
    "cp.async.commit_group": "asynchronous control",
    "cp.async.wait_group": "asynchronous control",
    "cp.async": "cp.async",
    "ld.global": "ld.global",
    "st.global": "st.global",
    "ld.shared": "ld.shared",
    "st.shared": "st.shared",
    "ld.param": "ld.param",
    "bar": "barrier",
    "fence": "barrier",
    "shfl": "shuffle",
    "bra": "branch",
    "ret": "branch",
    "mov": "move",
    "cvt": "convert",
    "setp": "predicate",
    "selp": "predicate",
}
BIT_OPERATIONS = {"and", "or", "xor", "not", "shl", "shr", "prmt", "lop3", "bfe", "shf"}


def class_of(name: str) -> str:
    """Returns the class of an instruction by its full name."""
    for prefix, kind in CLASSES.items():
        if name == prefix or name.startswith(prefix + "."):
            return kind
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if last in ("f32", "f16", "bf16", "f16x2", "bf16x2", "f32x2"):
        return "float"
    if last == "pred":
        return "predicate"
    return "bits" if first in BIT_OPERATIONS else "integer"


@dataclass
class Access:
    """One memory instruction: numbers of all its executions, summed over warps.

    Attributes:
        requests: warps with at least one active thread.
        bytes: what the threads asked for.
        unique: distinct bytes within a warp.
        parts: sectors touched (global memory), or wavefronts needed (shared memory).
        least: parts that the distinct bytes would need at best.
    """

    instruction: Instruction
    requests: int = 0
    bytes: int = 0
    unique: int = 0
    parts: int = 0
    least: int = 0

    def add(self, other: Access) -> None:
        """Adds the numbers of another one."""
        for name in ("requests", "bytes", "unique", "parts", "least"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Counts:
    """Counters of one execution of ``blocks`` blocks; a machine fills them.

    Attributes:
        executed: how many blocks have executed each instruction, by its place in the kernel's code.
        to_global, to_shared: an ``Access`` for each instruction that was executed, by its place in the kernel's code.
    """

    kernel: Kernel
    blocks: int
    executed: Array = field(init=False)
    to_global: dict[int, Access] = field(default_factory=dict)
    to_shared: dict[int, Access] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.executed = np.zeros(len(self.kernel.code), dtype=np.int64)
        self._places = {id(one): place for place, one in enumerate(self.kernel.code)}

    def execute(self, at: int, mask: Array | None) -> None:
        """Counts one instruction, once for each block with an active thread."""
        if mask is None:
            self.executed[at] += self.blocks
        else:
            self.executed[at] += int(mask.any(axis=1).sum()) * (self.blocks if mask.shape[0] == 1 else 1)

    def _access(self, table: dict[int, Access], one: Instruction, found: Access) -> None:
        table.setdefault(self._places[id(one)], Access(one)).add(found)

    def global_access(self, one: Instruction, addresses: Array, width: int, mask: Array | None) -> None:
        """Counts an access of ``width`` bytes per thread to global memory."""
        shape = (self.blocks, self.kernel.threads)
        active = np.ones(shape, dtype=bool) if mask is None else np.broadcast_to(mask, shape)
        where = np.broadcast_to(addresses, shape).reshape(-1, WARP).astype(np.int64)
        active = active.reshape(-1, WARP)
        some = active.any(axis=1)
        where, active = where[some], active[some]
        distinct = _distinct(where, active)
        found = Access(one, len(where), int(active.sum()) * width, int(distinct.sum()) * width)
        found.parts = int(_distinct(where // SECTOR, active).sum())
        found.least = int((-(-distinct * width // SECTOR)).sum())
        self._access(self.to_global, one, found)

    def shared_access(self, one: Instruction, offsets: Array, width: int, mask: Array | None) -> None:
        """Counts an access of ``width`` bytes per thread to shared memory."""
        rows = offsets.shape[0] if mask is None else max(offsets.shape[0], mask.shape[0])
        shape, times = (rows, self.kernel.threads), self.blocks // rows
        active = np.ones(shape, dtype=bool) if mask is None else np.broadcast_to(mask, shape)
        # Wide accesses take several phases: a phase moves at most 128 bytes, of 32, 16 or 8 threads.
        lanes = min(WARP, 128 // width)
        where = np.broadcast_to(offsets, shape).reshape(-1, lanes)
        parts, unique = _wavefronts(where, active.reshape(-1, lanes), width)
        warps = active.reshape(-1, WARP)
        per_warp = unique.reshape(len(warps), -1).sum(axis=1)
        found = Access(one, int(warps.any(axis=1).sum()) * times, int(active.sum()) * width * times)
        found.unique, found.parts = int(unique.sum()) * times, int(parts.sum()) * times
        found.least = int((-(-per_warp // 128)).sum()) * times
        self._access(self.to_shared, one, found)

    def matrix_access(self, one: Instruction, rows: Array, count: int, blocks: Array | None) -> None:
        """Counts ``ldmatrix`` or ``stmatrix``: each matrix of eight rows of 16 bytes is a phase."""
        times = self.blocks // rows.shape[0] if blocks is None else int(blocks.sum()) // rows.shape[0]
        where = rows.reshape(-1, 8)
        parts, unique = _wavefronts(where, np.ones(where.shape, dtype=bool), 16)
        found = Access(one, len(where) // count * times, len(where) * 128 * times)
        found.unique, found.parts = int(unique.sum()) * times, int(parts.sum()) * times
        found.least = int((-(-unique // 128)).sum()) * times
        self._access(self.to_shared, one, found)

    # Summaries.

    def add(self, other: Counts) -> None:
        """Adds the counts of other blocks of the same launch."""
        self.blocks += other.blocks
        self.executed += other.executed
        for mine, others in ((self.to_global, other.to_global), (self.to_shared, other.to_shared)):
            for place, access in others.items():
                mine.setdefault(place, Access(access.instruction)).add(access)

    def per_warp(self) -> Counter[str]:
        """Sums instructions by class, for an average warp."""
        total: Counter[str] = Counter()
        for one, times in zip(self.kernel.code, self.executed, strict=True):
            total[class_of(one.name)] += int(times)
        return Counter({kind: times / self.blocks for kind, times in total.items()})

    def by_source(self, accesses: dict[int, Access]) -> dict[tuple[str, str], Access]:
        """Sums the accesses of each line of source and each opcode; ``accesses``: ``to_global`` or ``to_shared``."""
        summed: dict[tuple[str, str], Access] = {}
        for access in accesses.values():
            key = access.instruction.source, access.instruction.name
            summed.setdefault(key, Access(access.instruction)).add(access)
        return summed


def _distinct(values: Array, active: Array) -> Array:
    """How many different values the active threads of each row have."""
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    # An inactive thread repeats an active one.
    first = values[np.arange(len(values)), active.argmax(axis=1)]
    ordered = np.sort(np.where(active, values, first[:, None]), axis=1)
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)


def _wavefronts(offsets: Array, active: Array, width: int) -> tuple[Array, Array]:
    """How many words of one bank each row (a phase) needs at most, one after another; and its distinct bytes.

    Parts of a word count as the whole word.
    """
    each = max(1, width // 4)
    words = (offsets[:, :, None] // 4 + np.arange(each)).reshape(len(offsets), -1)
    words = np.where(np.repeat(active, each, axis=1), words, -1)
    words.sort(axis=1)
    new = words >= 0
    new[:, 1:] &= words[:, 1:] != words[:, :-1]
    bank = np.arange(len(words))[:, None] * BANKS + words % BANKS
    load = np.bincount(bank[new], minlength=len(words) * BANKS).reshape(len(words), BANKS)
    return load.max(axis=1), new.sum(axis=1) * 4
