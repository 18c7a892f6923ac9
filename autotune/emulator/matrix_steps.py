"""Steps of the matrix instructions of a warp: ``mma.sync``, ``ldmatrix`` and ``stmatrix``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import matrix
from .faults import NotModelled
from .floats import Array
from .parser import Instruction, Register, Vector
from .state import WARP, Mask, State, Step

SHAPES = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "bf16",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "f16",
}


class Fragments:
    """Operands as matrices, each kept while its registers stay the same: kernels use an operand many times."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._kept: dict[tuple[int, ...], tuple[list[Array], Array]] = {}

    def matrix(self, places: list[int], make: Callable[..., Array], kind: str) -> Array:
        """Makes the matrix of some registers by ``matrix.left_operand`` or ``right_operand``."""
        values = [self.state.registers[place] for place in places]
        kept = self._kept.get(tuple(places))
        if kept is not None and all(old is new for old, new in zip(kept[0], values, strict=True)):
            return kept[1]
        made = make(values, self.state.shape, kind)
        self._kept[tuple(places)] = (values, made)
        return made


def multiply(state: State, fragments: Fragments, one: Instruction) -> Step:
    """Multiplies ``16 x 16`` by ``16 x 8`` matrices of 16-bit floats in each warp, and adds float32 sums."""
    kind = SHAPES.get(one.name)
    if kind is None or one.guard is not None:
        raise NotModelled(f"{one}: this matrix instruction is not modelled")
    if [len(operand.items) for operand in one.operands] != [4, 4, 2, 4]:
        raise NotModelled(f"{one}: not modelled")
    targets = one.operands[0].items
    left, right, sums = ([state.source(item, 32, one) for item in operand.items] for operand in one.operands[1:])

    def step(mask: Mask) -> None:
        state.whole_blocks(mask)
        a = fragments.matrix(left, matrix.left_operand, kind)
        b = fragments.matrix(right, matrix.right_operand, kind)
        result = matrix.multiply_add(a, b, [state.registers[place] for place in sums], state.shape)
        for target, value in zip(targets, result, strict=True):
            state.put(target, value, mask)

    return step


def _matrix_access(state: State, one: Instruction, registers: int, address: int) -> tuple[int, bool, Array]:
    """How many matrices, whether transposed, and the threads whose addresses are used.

    registers, address: the places of both in the operands.
    """
    parts = one.parts
    if parts[1:4] != ["sync", "aligned", "m8n8"] or parts[4] not in ("x1", "x2", "x4") or one.guard is not None:
        raise NotModelled(f"{one}: not modelled")
    if parts[5:] not in (["shared", "b16"], ["trans", "shared", "b16"]):
        raise NotModelled(f"{one}: not modelled")
    count, operand = int(parts[4][1:]), one.operands[registers]
    if not isinstance(operand, Vector) or len(operand.items) != count:
        raise NotModelled(f"{one}: {count} registers are wanted")
    lanes = np.ascontiguousarray(state.thread.reshape(-1, WARP)[:, : 8 * count]).reshape(1, -1)
    return count, parts[5] == "trans", lanes


def _rows(state: State, addresses: Array, count: int, blocks: Mask) -> Array:
    """The checked offsets of all rows of 16 bytes."""
    addresses = np.broadcast_to(addresses, (addresses.shape[0], state.threads))
    return state.shared.place(matrix.matrix_rows(addresses, count), 16, blocks)


def load_matrix(state: State, one: Instruction) -> Step:
    """Reads matrices of eight rows of 16 bytes from shared memory, and hands them out to the threads of a warp."""
    count, transposed, lanes = _matrix_access(state, one, 0, 1)
    targets, address = one.operands[0].items, state.address(one.operands[1], 32, one)
    if not all(isinstance(target, Register) for target in targets):
        raise NotModelled(f"{one}: not modelled")

    def step(mask: Mask) -> None:
        blocks = state.whole_blocks(mask)
        rows = _rows(state, address(), count, blocks)
        if state.check:
            state.shared.read(rows, 16, lanes, across(blocks, lanes.shape[1]))
        if state.counts is not None:
            state.counts.matrix_access(one, rows, count, blocks)
        words = state.shared.load(rows, 4, 4)
        for target, value in zip(targets, matrix.distribute(words, count, transposed), strict=True):
            state.put(target, value, mask)

    return step


def store_matrix(state: State, one: Instruction) -> Step:
    """Does the inverse of ``load_matrix``."""
    count, transposed, lanes = _matrix_access(state, one, 1, 0)
    address = state.address(one.operands[0], 32, one)
    places = [state.source(item, 32, one) for item in one.operands[1].items]

    def step(mask: Mask) -> None:
        blocks = state.whole_blocks(mask)
        rows, within = _rows(state, address(), count, blocks), across(blocks, lanes.shape[1])
        twice = state.check and state.shared.write(rows, 16, lanes, within)
        if state.counts is not None:
            state.counts.matrix_access(one, rows, count, blocks)
        words = matrix.collect([state.registers[place] for place in places], state.shape, transposed)
        state.shared.store(rows, words, 4, within, twice)

    return step


def across(mask: Mask, columns: int) -> Mask:
    """Widens a mask of whole blocks to so many columns."""
    return None if mask is None else np.broadcast_to(mask, (len(mask), columns))
