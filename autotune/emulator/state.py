"""State of an execution: registers, parameters, both memories, and who takes part.

A register is an array that broadcasts to ``[blocks, threads]``: ``[1, 1]`` if all threads agree by construction,
``[1, threads]`` or ``[blocks, 1]`` where it depends on one of the two. So addresses and loop counters cost little.
None is a register that nobody has set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .bit_operations import SIGNED, UNSIGNED
from .counts import Counts
from .faults import Fault, NotModelled
from .floats import U32, Array
from .global_memory import GlobalMemory
from .number_types import type_bits
from .parser import Address, Instruction, Kernel, Number, Register, Symbol
from .shared_memory import SharedMemory

# The threads that execute an instruction, bool ``[blocks or 1, threads or 1]``; None is everybody.
Mask = Array | None
# One instruction, ready to run. It gives None, or where to go on: a place in the code, or (place, mask that goes
# there, mask that goes on behind).
Step = Callable[[Mask], Any]
DTYPES: dict[int, Any] = {1: np.bool_, **UNSIGNED}
# What a register holds for threads that have not set it.
GARBAGE = {1: False, 8: 0xA5, 16: 0xA5A5, 32: 0xA5A5A5A5, 64: 0xA5A5A5A5A5A5A5A5}
WARP = 32
# Where a kernel's shared memory begins: the bytes before it are the system's (compute capability 8.0 and later). So an
# address that lacks its base is out of bounds.
SHARED_START = 1024


class State:
    """Everything that instructions read and change.

    Args:
        kernel: what is executed.
        grid: blocks along each axis.
        params: the arguments as integers, in the order of the kernel's parameters.
        memory: global memory, which is ready.
        shared_bytes: of each block, if the launch asks for more than the kernel's variables need.
        blocks: ``[n, 3]``, the blocks of the grid to run; all of them by default.
        counts: what to count into, if anything.
        check: whether to look for races and uninitialised reads.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        params: Sequence[int],
        memory: GlobalMemory,
        shared_bytes: int = 0,
        blocks: Array | None = None,
        counts: Counts | None = None,
        check: bool = True,
    ) -> None:
        self.kernel, self.grid, self.memory, self.counts, self.check = kernel, grid, memory, counts, check
        self.block_ids = all_blocks(grid) if blocks is None else blocks
        self.threads = kernel.threads
        if not self.threads or self.threads % WARP:
            raise NotModelled(f"{kernel.name}: a block must have whole warps of threads, got {self.threads}")
        self.shape = (len(self.block_ids), self.threads)
        self.param_places, self.param_bytes = _param_space(kernel, params)
        self.thread = np.arange(self.threads, dtype=U32)[None]
        x, y, z = self.block_ids.T
        linear = (z * grid[1] + y) * grid[0] + x
        # The number of a thread among those of the whole grid.
        self.who = (linear[:, None] * self.threads + self.thread).astype(np.int64)
        end = SHARED_START + max(kernel.shared_bytes, shared_bytes)
        self.shared = SharedMemory(len(self.block_ids), SHARED_START, end, self.threads, _smallest_write(kernel))
        self.registers: list[Any] = [None] * len(kernel.registers)
        self._numbers: dict[tuple[int, int], int] = {}

    def source(self, operand: Any, bits: int, one: Instruction) -> int:
        """The place of an operand in the register file, where numbers have places too.

        bits: what the instruction reads; 0 takes a register of any size.
        """
        if isinstance(operand, Register):
            if bits not in (0, operand.bits):
                raise NotModelled(f"{one}: a register of {operand.bits} bits where {bits} are read")
            return operand.index
        if isinstance(operand, Symbol):
            if operand.name in self.kernel.shared:
                operand = Number(SHARED_START + self.kernel.shared[operand.name])
            elif operand.name in self.param_places:
                operand = Number(self.param_places[operand.name])
            else:
                raise NotModelled(f"{one}: {operand.name} is not declared")
        if not isinstance(operand, Number) or bits not in DTYPES:
            raise NotModelled(f"{one}: operand not modelled: {operand}")
        key = (operand.value & ((1 << bits) - 1), bits)
        if key not in self._numbers:
            self._numbers[key] = len(self.registers)
            self.registers.append(np.full((1, 1), key[0], dtype=DTYPES[bits]))
        return self._numbers[key]

    def address(self, operand: Any, bits: int, one: Instruction) -> Callable[[], Array]:
        """Returns what computes an address of so many bits."""
        if not isinstance(operand, Address):
            raise NotModelled(f"{one}: an address is wanted, not {operand}")
        if isinstance(operand.base, Symbol):
            if operand.base.name not in self.kernel.shared:
                raise NotModelled(f"{one}: {operand.base.name} is not declared")
            place = SHARED_START + self.kernel.shared[operand.base.name] + operand.offset
            fixed = np.full((1, 1), place, dtype=UNSIGNED[bits])
            return lambda: fixed
        index = self.source(operand.base, 0, one)
        if operand.offset == 0:
            return lambda: self.registers[index]
        width = operand.base.bits
        offset = np.full((1, 1), operand.offset & ((1 << width) - 1), dtype=UNSIGNED[width])
        return lambda: self.registers[index] + offset

    def guard(self, one: Instruction) -> Callable[[], Array]:
        """Returns what tells for whom the guard of an instruction holds."""
        assert one.guard is not None
        registers, (register, negated) = self.registers, one.guard
        index = register.index
        return (lambda: ~registers[index]) if negated else (lambda: registers[index])

    def guarded(self, one: Instruction) -> Callable[[Mask], Mask]:
        """Returns what narrows a mask to the threads for which the guard holds."""
        if one.guard is None:
            return lambda mask: mask
        holds = self.guard(one)

        def narrow(mask: Mask) -> Mask:
            held = holds()
            if held.all():
                return mask
            return held if mask is None else held & mask

        return narrow

    def put(self, register: Register, value: Array, mask: Mask) -> None:
        """Sets a register, for the threads of the mask."""
        if mask is not None:
            old = self.registers[register.index]
            if old is None:
                old = np.full((1, 1), GARBAGE[register.bits], dtype=DTYPES[register.bits])
            value = np.where(mask, value, old)
        self.registers[register.index] = value

    def whole_blocks(self, mask: Mask) -> Mask:
        """Makes a mask ``[blocks, 1]``; a fault if it cuts a block, for instructions that all threads must reach."""
        if mask is None or mask.shape[1] == 1:
            return mask
        whole = np.all(mask, axis=1, keepdims=True)
        if not (whole == mask.any(axis=1, keepdims=True)).all():
            raise Fault("divergence", "not all threads of a block get here")
        return whole


def no_blocks(grid: tuple[int, int, int]) -> Array:
    """None of the blocks of a grid, ``[0, 3]``."""
    return np.zeros((0, 3), dtype=np.int64)


def all_blocks(grid: tuple[int, int, int]) -> Array:
    """All blocks of a grid, ``[n, 3]``, x running fastest."""
    return np.array([(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]).reshape(-1, 3)


def extended(value: Array, kind: str, bits: int) -> Array:
    """Widens what an instruction gives to a register that has more bits; signed types keep their sign."""
    size = 8 * value.dtype.itemsize
    if value.dtype == object:
        raise TypeError("a register that nobody has set")
    if size == bits or value.dtype == np.bool_:
        return value
    if size > bits:
        raise NotModelled(f"a result of {size} bits does not fit a register of {bits}")
    if kind[0] == "s":
        return value.view(SIGNED[size]).astype(SIGNED[bits]).view(UNSIGNED[bits])
    return value.astype(UNSIGNED[bits])


def with_garbage(function: Callable[..., Array], bits: int) -> Callable[..., Array]:
    """Lets a function take registers that nobody has set: a compiler moves bytes about that nobody looks at."""
    garbage = np.full((1, 1), GARBAGE[bits], dtype=UNSIGNED[bits])
    return lambda *values: function(*(garbage if value is None else value for value in values))


def _smallest_write(kernel: Kernel) -> int:
    """Bytes that no write to shared memory splits."""
    widths = [16]
    for one in kernel.code:
        if one.name.startswith("st.shared"):
            widths.append(type_bits(one.parts[-1]) // 8)
        elif one.name.startswith(("cp.async.ca.", "cp.async.cg.")):
            widths.append(one.operands[2].value)
    return min(widths)


def _param_space(kernel: Kernel, params: Sequence[int]) -> tuple[dict[str, int], Array]:
    """The place of each parameter, and the bytes of all: kernels also choose among parameters by address."""
    places, size = {}, 0
    for name, width in kernel.params:
        size = -(-size // width) * width
        places[name] = size
        size += width
    raw = bytearray(-(-size // 8) * 8)
    for (name, width), value in zip(kernel.params, params, strict=True):
        raw[places[name] : places[name] + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return places, np.frombuffer(bytes(raw), dtype=np.uint8)
