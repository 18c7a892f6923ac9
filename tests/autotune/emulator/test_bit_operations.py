"""Shifts, fields and permutations against plain Python integers."""

import numpy as np
import pytest

from mebp_triton.autotune.emulator.bit_operations import (
    divide,
    field_extractor,
    funnel_shifter,
    insert_field,
    logic_of_three,
    permute,
    shifter,
)

RNG = np.random.default_rng(1)
A, B, C = (RNG.integers(0, 2**32, (1, 300), dtype=np.uint64).astype(np.uint32) for _ in range(3))


def word(value):
    return np.full((1, 1), value, dtype=np.uint32)


def signed(value, bits=32):
    return value - (1 << bits) if value >> (bits - 1) else value


@pytest.mark.parametrize("by", [0, 1, 17, 31, 32, 200])
def test_shifts(by):
    lefts, rights, signs = (shifter(32, *kind)(A, word(by)) for kind in ((True, False), (False, False), (False, True)))
    for x, left, right, sign in zip(A.flat, lefts.flat, rights.flat, signs.flat, strict=True):
        x = int(x)
        assert left == x << by & 0xFFFFFFFF and right == x >> by
        assert signed(int(sign)) == signed(x) >> by


def test_shifts_of_other_sizes():
    wide = A.astype(np.uint64) << np.uint64(31)
    assert (shifter(64, True, False)(wide, word(5)) == wide << np.uint64(5)).all()
    assert (shifter(16, False, True)(np.uint16([[0x8000]]), word(4)) == 0xF800).all()


@pytest.mark.parametrize(("at", "length"), [(3, 4), (0, 1), (25, 1), (4, 28), (0, 32), (20, 20), (40, 3), (5, 0)])
def test_fields(at, length):
    """Beyond the register there are zeros, or the sign."""
    plain = field_extractor(32, False)(A, word(at), word(length))
    with_sign = field_extractor(32, True)(A, word(at), word(length))
    for x, got, got_signed in zip(A.flat, plain.flat, with_sign.flat, strict=True):
        field = int(x) >> at & ((1 << length) - 1)
        assert got == field
        # The bits of a number of any length: copies of the sign go on.
        wide = signed(int(x)) >> at & ((1 << length) - 1)
        assert signed(int(got_signed)) == (0 if length == 0 else signed(wide, length))


@pytest.mark.parametrize(("at", "length"), [(16, 8), (0, 32), (28, 10), (32, 1), (200, 5), (5, 0), (31, 1)])
def test_insertions(at, length):
    """What would lie beyond the register is left out."""
    for x, y, got in zip(A.flat, B.flat, insert_field(A, B, word(at), word(length)).flat, strict=True):
        places = {place for place in range(at, at + length) if place < 32}
        bits = [int(x) >> (place - at) & 1 if place in places else int(y) >> place & 1 for place in range(32)]
        assert got == sum(bit << place for place, bit in enumerate(bits))


@pytest.mark.parametrize("selector", [0x4140, 0x7541, 0x3210, 0xBA98, 0x0F7C])
def test_permutations(selector):
    one = permute(A, B, word(selector))
    many = permute(A, B, np.broadcast_to(word(selector), A.shape).copy())
    for x, y, first, second in zip(A.flat, B.flat, one.flat, many.flat, strict=True):
        both, wanted = int(y) << 32 | int(x), 0
        for place in range(4):
            nibble = selector >> (4 * place) & 15
            byte = both >> (8 * (nibble & 7)) & 255
            wanted |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << (8 * place)
        assert first == second == wanted


@pytest.mark.parametrize("table", [0xEA, 0x96, 0x1B, 0x80, 0, 0xFF])
def test_logic_of_three(table):
    found = logic_of_three(A, B, C, word(table))
    for x, y, z, got in zip(A.flat, B.flat, C.flat, found.flat, strict=True):
        cases = [(int(x) >> i & 1) << 2 | (int(y) >> i & 1) << 1 | int(z) >> i & 1 for i in range(32)]
        assert got == sum((table >> case & 1) << i for i, case in enumerate(cases))


@pytest.mark.parametrize("by", [0, 5, 31, 32, 40])
def test_funnel_shifts(by):
    for wraps in (True, False):
        distance = by & 31 if wraps else min(by, 32)
        left, right = (funnel_shifter(side, wraps)(A, B, word(by)) for side in (True, False))
        for low, high, up, down in zip(A.flat, B.flat, left.flat, right.flat, strict=True):
            both = int(high) << 32 | int(low)
            assert up == both << distance >> 32 & 0xFFFFFFFF and down == both >> distance & 0xFFFFFFFF


def test_division_towards_zero():
    quotients, plain = divide(A, B | np.uint32(1), True), divide(A, B | np.uint32(1), False)
    for x, y, got, unsigned in zip(A.flat, (B | np.uint32(1)).flat, quotients.flat, plain.flat, strict=True):
        a, b = signed(int(x)), signed(int(y))
        assert signed(int(got)) == abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        assert unsigned == int(x) // int(y)
    assert divide(word(5), word(0), True) == 0xFFFFFFFF
