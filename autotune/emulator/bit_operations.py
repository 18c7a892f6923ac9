"""Bits within a thread: shifts, bit fields, permutations of bytes, three-operand logic, in numpy.

All functions take and give unsigned arrays that broadcast to ``[blocks, threads]``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .floats import U16, U32, U64, Array

UNSIGNED = {8: np.uint8, 16: U16, 32: U32, 64: U64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def shifter(bits: int, left: bool, signed: bool) -> Callable[[Array, Array], Array]:
    """Returns ``shl`` or ``shr``, which shift everything out where the distance is the register's size or more."""

    def shift(value: Array, by: Array) -> Array:
        read = value.view(SIGNED[bits]) if signed else value
        most = by.dtype.type(bits - 1)
        inside = np.minimum(by, most).astype(read.dtype)
        shifted = (read << inside if left else read >> inside).view(UNSIGNED[bits])
        if signed and not left or (by <= most).all():
            # A signed number that is shifted out leaves its sign, which the largest distance leaves too.
            return shifted
        return np.where(by > most, shifted.dtype.type(0), shifted)

    return shift


def field_extractor(bits: int, signed: bool) -> Callable[[Array, Array, Array], Array]:
    """Returns ``bfe``: bits ``at .. at + length``; beyond the register there are zeros, or copies of the sign."""
    right, table = shifter(bits, False, signed), SIGNED if signed else UNSIGNED

    def extract(value: Array, at: Array, length: Array) -> Array:
        at, length = at & U32(255), length & U32(255)
        moved = right(value, at).view(table[bits])
        spare = np.minimum(U32(bits) - np.minimum(length, U32(bits)), U32(bits - 1)).astype(moved.dtype)
        kept = ((moved << spare) >> spare).view(UNSIGNED[bits])
        return np.where(length == 0, kept.dtype.type(0), kept)

    return extract


def insert_field(value: Array, into: Array, at: Array, length: Array) -> Array:
    """Computes ``bfi.b32``: the low ``length`` bits of a value take the place of those from ``at`` on."""
    at, length = ((one & U32(255)).astype(U64) for one in (at, length))
    at, length = np.minimum(at, U64(32)), np.minimum(length, U64(32))
    field = ((U64(1) << length) - U64(1)) << at
    return ((into & ~field) | ((value.astype(U64) << at) & field)).astype(U32)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """Computes ``prmt``: each nibble of the selector names a byte of ``b:a``, or that byte's sign."""
    if selector.size == 1:
        return _permute_by_one(a, b, int(selector.flat[0]))
    both = b.astype(U64) << U64(32) | a.astype(U64)
    total: Array = np.zeros((1, 1), dtype=U32)
    for place in range(4):
        nibble = (selector >> U32(4 * place)) & U32(15)
        byte = (both >> ((nibble & U32(7)).astype(U64) * U64(8))).astype(U32) & U32(255)
        sign = np.where(byte & U32(128), U32(255), U32(0))
        total = total | (np.where(nibble & U32(8), sign, byte) << U32(8 * place))
    return total


def _permute_by_one(a: Array, b: Array, selector: int) -> Array:
    """Does what ``permute`` does for one selector, without 64-bit numbers."""
    total: Array = np.zeros((1, 1), dtype=U32)
    for place in range(4):
        nibble = selector >> (4 * place) & 15
        source, byte = (b, (nibble & 7) - 4) if nibble & 4 else (a, nibble & 3)
        if nibble & 8:
            taken = np.where(source & U32(128 << (8 * byte)), U32(255 << (8 * place)), U32(0))
        else:
            taken = source & U32(255 << (8 * byte))
            if place > byte:
                taken = taken << U32(8 * (place - byte))
            elif byte > place:
                taken = taken >> U32(8 * (byte - place))
        total = total | taken
    return total


def logic_of_three(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Computes ``lop3``: bit ``4a + 2b + c`` of the table is the result for bits a, b and c."""
    number = int(table.flat[0])
    total: Array = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), dtype=U32)
    for case in range(8):
        if number >> case & 1:
            total = total | ((a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c))
    return total


def funnel_shifter(left: bool, wraps: bool) -> Callable[[Array, Array, Array], Array]:
    """Returns ``shf``: the upper word of ``high:low`` shifted left, or the lower one of it shifted right."""

    def shift(low: Array, high: Array, by: Array) -> Array:
        by = (by & U32(31) if wraps else np.minimum(by, U32(32))).astype(U64)
        both = high.astype(U64) << U64(32) | low.astype(U64)
        return ((both << by) >> U64(32) if left else both >> by).astype(U32)

    return shift


def divide(a: Array, b: Array, signed: bool) -> Array:
    """Divides integers, towards zero. A division by zero gives all ones, as on the hardware."""
    kind = a.dtype
    if signed:
        a, b = (value.view(SIGNED[8 * kind.itemsize]) for value in (a, b))
    safe = np.where(b == 0, b.dtype.type(1), b)
    with np.errstate(over="ignore"):
        quotient = np.abs(a) // np.abs(safe)
        if signed:
            quotient = np.where((a < 0) != (safe < 0), -quotient, quotient)
    return np.where(b == 0, ~b.dtype.type(0), quotient).view(kind)
