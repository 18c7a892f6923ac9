"""Layouts of the matrix instructions, written down once more, element by element, from the PTX ISA's text."""

import numpy as np
import pytest

from mebp_triton.autotune.emulator import matrix
from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.emulator.floats import to_f16

RNG = np.random.default_rng(3)
SHAPE = (2, 64)
WARPS = 4


def f16(*shape):
    """Small whole numbers, whose products and sums are exact."""
    return RNG.integers(-8, 9, shape).astype(np.float32)


def packed_by(place):
    """Registers ``[blocks, threads]``, each of two numbers: ``place(warp, lane, register, half)`` -> a float."""
    registers = []
    for register in range(place.registers):
        words = np.zeros((WARPS, 32, 2), dtype=np.uint16)
        for warp in range(WARPS):
            for lane in range(32):
                for half in range(2):
                    words[warp, lane, half] = to_f16(np.float32(place(warp, lane, register, half)).reshape(1))[0]
        registers.append(words.view(np.uint32).reshape(SHAPE))
    return registers


def test_the_product_of_a_warp():
    """Row of A: lane / 4, plus 8 in registers 1 and 3; column: 2 * (lane % 4), plus 8 in registers 2 and 3."""
    a, b, c = f16(WARPS, 16, 16), f16(WARPS, 16, 8), f16(WARPS, 16, 8)

    def left(warp, lane, register, half):
        return a[warp, lane // 4 + 8 * (register % 2), lane % 4 * 2 + half + 8 * (register // 2)]

    def right(warp, lane, register, half):
        return b[warp, lane % 4 * 2 + half + 8 * register, lane // 4]

    left.registers, right.registers = 4, 2
    made = matrix.left_operand(packed_by(left), SHAPE, "f16"), matrix.right_operand(packed_by(right), SHAPE, "f16")
    assert np.array_equal(made[0], a) and np.array_equal(made[1], b)

    # Sums: row lane / 4, plus 8 in registers 2 and 3; column 2 * (lane % 4) + register % 2.
    def spread(values):
        found = np.zeros((4, WARPS, 32), dtype=np.float32)
        for register in range(4):
            for lane in range(32):
                row, column = lane // 4 + 8 * (register // 2), lane % 4 * 2 + register % 2
                found[register, :, lane] = values[:, row, column]
        return found.reshape(4, *SHAPE)

    result = matrix.multiply_add(*made, list(spread(c).view(np.uint32)), SHAPE)
    assert np.array_equal(np.stack(result).view(np.float32), spread(a @ b + c))


def rows_of(memory):
    """The words of rows of 16 bytes, as ``SharedMemory.load`` gives them: ``memory`` uint16 ``[blocks, rows, 8]``."""
    words = memory.view(np.uint32)
    return [words[..., part] for part in range(4)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_handed_out_to_a_warp(count, transposed):
    """Lane l gets elements 2 * (l % 4) and the next of row l / 4; of the transposed matrix likewise."""
    memory = RNG.integers(0, 65536, (2, 2 * count * 8, 8)).astype(np.uint16)
    found = matrix.distribute(rows_of(memory), count, transposed)
    matrices = memory.reshape(2, 2, count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(-1, -2)
    for index, register in enumerate(found):
        halves = np.ascontiguousarray(register).view(np.uint16).reshape(2, 2, 32, 2)
        for lane in range(32):
            wanted = matrices[:, :, index, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert np.array_equal(halves[:, :, lane], wanted)
    back = matrix.collect(found, SHAPE, transposed)
    assert all(np.array_equal(one, other) for one, other in zip(back, rows_of(memory), strict=True))


def test_addresses_of_rows():
    addresses = np.arange(64)[None]
    assert matrix.matrix_rows(addresses, 2)[0].tolist() == [*range(16), *range(32, 48)]


def descriptor(start, leading, stride, mode):
    return np.uint64([[start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62]])


def test_addresses_without_a_swizzle():
    """Blocks of eight rows of 16 bytes; columns' blocks are ``leading`` apart, rows' blocks ``stride``."""
    found = matrix.described(descriptor(1024, 128, 256, 0), 16, False)[0, 0]
    for row in range(16):
        for column in range(16):
            assert found[row, column] == 1024 + row % 8 * 16 + row // 8 * 256 + column // 8 * 128 + column % 8 * 2


@pytest.mark.parametrize(("mode", "wide"), [(1, 128), (2, 64), (3, 32)])
def test_addresses_with_a_swizzle(mode, wide):
    """Rows are ``wide`` bytes apart. Bits of 16 bytes are exchanged by the row, counted in lines of 128 bytes."""
    found = matrix.described(descriptor(1024, 16, 8 * wide, mode), 8, False)[0, 0]
    for row in range(8):
        for column in range(16):
            plain = 1024 + row * wide + column * 2
            assert found[row, column] == plain ^ ((plain >> 7 & (wide // 16 - 1)) << 4)
    # Nothing is read twice.
    assert len(np.unique(found)) == found.size


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_a_transposed_operand_has_rows_side_by_side(mode):
    found = matrix.described(descriptor(1024, 32768, 2048, mode), 64, True)[0, 0]
    assert len(np.unique(found)) == 64 * 16
    assert (np.diff(found[:8], axis=0) == 2).all()


def test_descriptors_of_other_layouts_are_refused():
    with pytest.raises(NotModelled, match="base offset"):
        matrix.described(descriptor(1024, 16, 256, 1) | np.uint64(1 << 49), 8, False)
    with pytest.raises(NotModelled, match="different layouts"):
        matrix.described(np.concatenate((descriptor(0, 16, 256, 1), descriptor(0, 16, 512, 1))), 8, False)


def test_the_product_of_four_warps():
    """Row of a sum: 16 * warp + lane / 4, plus 8 in every second pair; column: 8 * (register / 4) + 2 * (lane % 4)."""
    a, b = f16(1, 1, 64, 16), f16(1, 1, 24, 16)
    found = matrix.group_multiply(a, b, (1, 128))
    product = a[0, 0] @ b[0, 0].T
    assert len(found) == 12
    for register, values in enumerate(found):
        for thread in range(128):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register // 2 % 2)
            assert values[0, thread] == product[row, register // 4 * 8 + thread % 4 * 2 + register % 2]
