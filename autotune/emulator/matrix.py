"""Layouts of the matrix instructions: which thread's register holds which element, as in the figures of the PTX ISA.

Registers are ``[blocks, threads]`` of whole warps. Products of 16-bit floats are exact, sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .faults import NotModelled
from .floats import U16, U32, U64, Array, bf16_to_f32, f16_to_f32

Shape = tuple[int, int]
# The two uppermost bits of a descriptor -> how many bits of an address are exchanged: none, or 128, 64 or 32 bytes.
SWIZZLE_BITS = {0: 0, 1: 3, 2: 2, 3: 1}


def numbers_of(words: Array, kind: str) -> Array:
    """Reads uint16 as float32. kind: "bf16" or "f16"."""
    return bf16_to_f32(words) if kind == "bf16" else f16_to_f32(words)


def _by_warp(registers: Sequence[Array], shape: Shape, kind: str) -> Array:
    """Numbers ``[registers, warps of all blocks, 8, 4, 2]``: lane = 4 * row + column, and two numbers in a register."""
    words = np.stack([np.broadcast_to(one, shape).reshape(-1, 8, 4) for one in registers])
    return numbers_of(words[..., None].view(U16), kind)


def left_operand(registers: Sequence[Array], shape: Shape, kind: str) -> Array:
    """Makes A, float32 ``[warps, 16, 16]``, of four registers."""
    # Register = row half + 2 * column half.
    # [column half, row half, warp, row, column pair, column]
    parts = _by_warp(registers, shape, kind)
    parts = parts.reshape(2, 2, *parts.shape[1:])
    return np.ascontiguousarray(parts.transpose(2, 1, 3, 0, 4, 5)).reshape(-1, 16, 16)


def right_operand(registers: Sequence[Array], shape: Shape, kind: str) -> Array:
    """Makes B, float32 ``[warps, 16, 8]``, of two registers."""
    # [row half, warp, column, row pair, row]
    parts = _by_warp(registers, shape, kind)
    return np.ascontiguousarray(parts.transpose(1, 0, 3, 4, 2)).reshape(-1, 16, 8)


def multiply_add(left: Array, right: Array, sums: Sequence[Array], shape: Shape) -> list[Array]:
    """Computes ``A·B + C``. C and the result are four registers of float32 bits."""
    # [warp, row half, row, column pair, column]
    product = np.matmul(left, right).reshape(-1, 2, 8, 4, 2)
    result = []
    for register, old in enumerate(sums):
        part = np.ascontiguousarray(product[:, register >> 1, :, :, register & 1]).reshape(shape)
        result.append((part + old.view(np.float32)).view(U32))
    return result


def matrix_rows(addresses: Array, count: int) -> Array:
    """Picks the addresses of rows that ``ldmatrix`` uses: ``[blocks, warps * count * 8]`` of ``[blocks, threads]``."""
    blocks, threads = addresses.shape
    rows = addresses.reshape(blocks, threads // 32, 32)[:, :, : 8 * count]
    return np.ascontiguousarray(rows).reshape(blocks, -1)


def distribute(rows: Sequence[Array], count: int, transposed: bool) -> list[Array]:
    """Hands matrices out to threads, as ``ldmatrix`` does.

    rows: four words of every row, each ``[blocks, warps * count * 8]``. Returns ``count`` registers.
    """
    words = np.stack(rows, axis=-1)
    blocks = words.shape[0]
    words = _maybe_transposed(words.reshape(blocks, -1, count, 8, 4), transposed)
    return [np.ascontiguousarray(words[:, :, index]).reshape(blocks, -1) for index in range(count)]


def collect(registers: Sequence[Array], shape: Shape, transposed: bool) -> list[Array]:
    """Does the inverse of ``distribute``, as ``stmatrix`` does."""
    blocks = shape[0]
    words = np.stack([np.broadcast_to(one, shape).reshape(blocks, -1, 8, 4) for one in registers], axis=2)
    words = _maybe_transposed(words, transposed).reshape(blocks, -1, 4)
    return [np.ascontiguousarray(words[..., place]) for place in range(4)]


def _maybe_transposed(words: Array, transposed: bool) -> Array:
    """Transposes matrices of eight rows of eight 16-bit elements, uint32 ``[..., 8, 4]``."""
    if not transposed:
        return words
    elements = np.ascontiguousarray(words).view(U16).swapaxes(-1, -2)
    return np.ascontiguousarray(elements).view(U32)


def described(descriptors: Array, rows: int, across: bool) -> Array:
    """Finds the elements of a 16-bit operand ``[rows, 16]`` in shared memory: addresses ``[..., rows, 16]``.

    These are the canonical layouts of the PTX ISA's "Shared Memory Matrix Layout".

    Args:
        descriptors: uint64; they may differ in their start address only.
        rows: of the operand.
        across: neighbouring rows lie side by side, because the operand is transposed; otherwise columns do.
    """
    fields = [((descriptors >> U64(at)) & U64(0x3FFF)).astype(np.int64) << 4 for at in (0, 16, 32)]
    first = descriptors.flat[0]
    if (descriptors >> U64(16) != first >> U64(16)).any() or int(first) >> 49 & 7:
        raise NotModelled("descriptors with a base offset, or of different layouts, are not modelled")
    start, leading, stride = fields[0], int(fields[1].flat[0]), int(fields[2].flat[0])
    bits = SWIZZLE_BITS[int(first) >> 62]
    # A row of the pattern has so many runs of 16 bytes.
    wide = 1 << bits
    row, column = np.arange(rows)[:, None], np.arange(16)[None]
    if across:
        outer, offset = row // 8, column % 8 * wide * 16 + row % 8 * 2
        if bits:
            offset = offset + outer % wide * 16 + outer // wide * leading + column // 8 * stride
        else:
            offset = offset + outer * stride + column // 8 * leading
    else:
        offset = row % 8 * wide * 16 + row // 8 * stride + column % 8 * 2 + column // 8 * (16 if bits else leading)
    address = start[..., None, None] + offset
    return address ^ ((address >> 7 & (wide - 1)) << 4)


def group_multiply(left: Array, right: Array, shape: Shape) -> list[Array]:
    """Computes A ``[blocks, groups, 64, 16]`` times the transpose of B ``[blocks, groups, N, 16]``.

    Returns ``N // 2`` registers of float32, as the four warps of each group hold them.
    """
    product = np.matmul(left, right.swapaxes(-1, -2))
    blocks, groups, _, columns = product.shape
    # [block, group, warp, row half, row, column block, column pair, column]
    product = product.reshape(blocks, groups, 4, 2, 8, columns // 8, 4, 2)
    order = product.transpose(5, 3, 7, 0, 1, 2, 4, 6)
    return list(np.ascontiguousarray(order).reshape(columns // 2, *shape))
