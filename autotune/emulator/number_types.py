"""PTX's types: their bits, and how numbers are read from a register and written to one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bit_operations import SIGNED, UNSIGNED
from .faults import NotModelled
from .floats import FLOATS, U32, U64, Array, halves, packed

# Types that hold two numbers: the type of each, and the bits of both.
PAIRS = {"f16x2": ("f16", 32), "bf16x2": ("bf16", 32), "f32x2": ("f32", 64)}


def type_bits(name: str) -> int:
    """Returns the bits of a value of a PTX type."""
    special = {"pred": 1, "f16x2": 32, "bf16x2": 32, "f32x2": 64, "bf16": 16}
    if name in special:
        return special[name]
    if name[:1] in ("b", "u", "s", "f") and name[1:] in ("8", "16", "32", "64", "128"):
        return int(name[1:])
    raise NotModelled(f"type .{name} is not modelled")


def is_float(kind: str) -> bool:
    """Tells whether a type holds one or two floats."""
    return kind in FLOATS or kind in PAIRS


def reader(kind: str, wide: bool = False) -> Callable[[Array], Array]:
    """Returns what makes numbers of a register; those of a pair lie along a new last axis.

    wide: 16-bit floats become float64, in which their sums and products are exact or rounded to odd.
    """
    if kind in PAIRS:
        single, bits = PAIRS[kind]
        read = reader(single, wide)
        if bits == 64:
            return lambda value: read(np.ascontiguousarray(value)[..., None].view(U32))
        return lambda value: read(halves(value))
    if kind in FLOATS:
        read = FLOATS[kind][0]
        return (lambda value: read(value).astype(np.float64)) if wide and type_bits(kind) == 16 else read
    bits = type_bits(kind)
    if kind[0] == "f" or bits not in UNSIGNED:
        raise NotModelled(f"numbers of type .{kind} are not modelled")
    return (lambda value: value.view(SIGNED[bits])) if kind[0] == "s" else (lambda value: value)


def writer(kind: str) -> Callable[[Array], Array]:
    """Returns what makes a register of numbers, with one rounding."""
    if kind in PAIRS:
        single, bits = PAIRS[kind]
        write = FLOATS[single][1]
        if bits == 64:
            return lambda values: np.ascontiguousarray(write(values)).view(U64)[..., 0]
        return lambda values: packed(write(values))
    if kind in FLOATS:
        return FLOATS[kind][1]
    unsigned = UNSIGNED[type_bits(kind)]
    return lambda values: values.view(unsigned)
