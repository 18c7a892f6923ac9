"""Floats as bits: float16, bfloat16 and float32 results with one correct rounding, in numpy.

A register is an array of uint16, uint32 or uint64, whatever it holds. A pair in one register is unpacked to a last axis
of two. Sums that float64 cannot hold are rounded to odd, which a second rounding to fewer bits cannot go wrong on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
U16, U32, U64 = np.uint16, np.uint32, np.uint64
NAN_16 = U16(0x7FFF)


def as_f32(bits: Array) -> Array:
    """Reads uint32 bits as float32."""
    return bits.view(np.float32)


def bf16_to_f32(bits: Array) -> Array:
    """Reads uint16 bits as bfloat16."""
    return (bits.astype(U32) << U32(16)).view(np.float32)


def f16_to_f32(bits: Array) -> Array:
    """Reads uint16 bits as float16."""
    return bits.view(np.float16).astype(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """Rounds float32 to the nearest bfloat16, ties to even; NaN becomes 0x7FFF."""
    bits = np.ascontiguousarray(values).view(U32)
    rounded = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    nan = np.isnan(values)
    return np.where(nan, NAN_16, rounded) if nan.any() else rounded


def to_bf16(values: Array) -> Array:
    """Rounds float32 or float64 to bfloat16, once."""
    return f32_to_bf16(odd_f32(values) if values.dtype == np.float64 else values)


def to_f16(values: Array) -> Array:
    """Rounds float32 or float64 to float16, once, ties to even; NaN becomes 0x7FFF."""
    with np.errstate(all="ignore"):
        rounded = values.astype(np.float16).view(U16)
    nan = np.isnan(values)
    return np.where(nan, NAN_16, rounded) if nan.any() else rounded


def to_f32(values: Array) -> Array:
    """Rounds to float32 and gives its bits."""
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32).view(U32)


# How a float type is read from a register, and how a result gets back into one.
FLOATS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "f32": (as_f32, to_f32),
    "f16": (f16_to_f32, to_f16),
    "bf16": (bf16_to_f32, to_bf16),
}


def flush(values: Array) -> Array:
    """Makes subnormal float32 numbers zeros of the same sign, as the modifier ``.ftz`` does."""
    subnormal = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(subnormal, np.copysign(values.dtype.type(0), values), values) if subnormal.any() else values


def odd_f32(values: Array) -> Array:
    """Rounds float64 to float32, to odd."""
    with np.errstate(all="ignore"):
        rounded = values.astype(np.float32)
        inexact = rounded.astype(np.float64) != values
    inexact &= ~np.isnan(values)
    if not inexact.any():
        return rounded
    bits = rounded.view(U32).copy()
    # One step towards zero where the rounding went away from it; then the last bit is set.
    bits[inexact & (np.abs(rounded.astype(np.float64)) > np.abs(values))] -= U32(1)
    bits[inexact] |= U32(1)
    return bits.view(np.float32)


def odd_sum(first: Array, second: Array) -> Array:
    """Adds in float64, rounded to odd."""
    with np.errstate(all="ignore"):
        total = first + second
        shifted = total - first
        error = (first - (total - shifted)) + (second - shifted)
    inexact = (error != 0) & np.isfinite(total)
    if not inexact.any():
        return total
    bits = np.array(total, copy=True).view(U64)
    bits[inexact & ((error < 0) != (total < 0))] -= U64(1)
    bits[inexact] |= U64(1)
    return bits.view(np.float64)


def fused(a: Array, b: Array, c: Array) -> Array:
    """Computes ``a * b + c`` of float16, bfloat16 or float32 numbers in float64, rounded to odd.

    The product of two numbers with 24 bits is exact in float64.
    """
    with np.errstate(all="ignore"):
        return odd_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))


def halves(register: Array) -> Array:
    """Unpacks uint32 ``[...]`` to uint16 ``[..., 2]``, the lower half first."""
    return np.ascontiguousarray(register)[..., None].view(U16)


def packed(parts: Array) -> Array:
    """Packs uint16 ``[..., 2]`` into uint32 ``[...]``."""
    return np.ascontiguousarray(parts).view(U32)[..., 0]
