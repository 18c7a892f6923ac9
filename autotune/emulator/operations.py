"""Arithmetic within a thread: one numpy function for each instruction, over all threads at once.

``operation_of`` gives a function of unsigned arrays (bool for predicates) and the bits of each operand. An instruction,
type or modifier that is not listed here is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bit_operations import (
    SIGNED,
    UNSIGNED,
    divide,
    field_extractor,
    funnel_shifter,
    insert_field,
    logic_of_three,
    permute,
    shifter,
)
from .faults import NotModelled
from .floats import FLOATS, U32, Array, as_f32, flush, fused, odd_sum
from .number_types import PAIRS, is_float, reader, type_bits, writer
from .parser import Instruction

COMPARISONS: dict[str, Callable[[Any, Any], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
ROUNDINGS: dict[str, Callable[[Array], Array]] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
# Modifiers that change nothing: rounding to nearest is the default, and approximations are the exact results.
HARMLESS = {"rn", "approx", "full"}


@dataclass
class Operation:
    """A function of registers, and the bits of each of its operands; 0 stands for a register of any size.

    Registers are unsigned arrays, or bool for predicates. The result is one too, or a tuple of two.
    """

    function: Callable[..., Any]
    bits: tuple[int, ...]


def _modifiers(one: Instruction, *allowed: str, types: int = 1) -> set[str]:
    """The modifiers between the name and its types; raises for one that would change the result in an unknown way."""
    found = set(one.parts[1 : len(one.parts) - types])
    if found - set(allowed) - (HARMLESS if is_float(one.parts[-1]) else set()):
        raise NotModelled(f"{one}: modifiers not modelled")
    return found


def _elementwise(one: Instruction, function: Callable[..., Array], count: int, *allowed: str) -> Operation:
    """A function of numbers: floats are rounded once, integers are cut to the register."""
    kind = one.parts[-1]
    mixed = len(one.parts) > 2 and one.parts[-2] == "f32" and kind in ("f16", "bf16")
    modifiers = _modifiers(one, *allowed, "ftz", types=2 if mixed else 1)
    if mixed:
        # ``add.f32.bf16``: the last operand and the result are float32, the others have 16 bits.
        reads = [FLOATS[kind][0]] * (count - 1) + [as_f32]
        bits = (*[16] * (count - 1), 32)
        write = writer("f32")
    else:
        reads, bits, write = [reader(kind, wide=True)] * count, (type_bits(kind),) * count, writer(kind)
    if "ftz" in modifiers and (mixed or kind not in ("f32", "f32x2")):
        raise NotModelled(f"{one}: .ftz of this type is not modelled")

    def run(*values: Array) -> Array:
        with np.errstate(all="ignore"):
            return write(function(*(read(value) for read, value in zip(reads, values, strict=True))))

    def run_flushed(*values: Array) -> Array:
        with np.errstate(all="ignore"):
            result = function(*(flush(read(value)) for read, value in zip(reads, values, strict=True)))
            return write(flush(result.astype(np.float32)))

    return Operation(run_flushed if "ftz" in modifiers else run, bits)


def _sum(a: Array, b: Array) -> Array:
    return odd_sum(a, b) if a.dtype == np.float64 else a + b


def _difference(a: Array, b: Array) -> Array:
    return odd_sum(a, -b) if a.dtype == np.float64 else a - b


def _mul(one: Instruction) -> Operation:
    kind, form = one.parts[-1], one.parts[1]
    if is_float(kind):
        return _elementwise(one, np.multiply, 2)
    if len(one.parts) != 3 or form not in ("lo", "hi", "wide"):
        raise NotModelled(f"{one}: not modelled")
    bits, read = type_bits(kind), reader(kind)
    if form == "lo":
        return Operation(np.multiply, (bits, bits))
    if bits == 64:
        raise NotModelled(f"{one}: not modelled")
    double = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * bits]

    def multiply(a: Array, b: Array) -> Array:
        product = read(a).astype(double) * read(b).astype(double)
        if form == "hi":
            return (product >> double(bits)).astype(UNSIGNED[bits])
        return product.view(UNSIGNED[2 * bits])

    return Operation(multiply, (bits, bits))


def _mad(one: Instruction) -> Operation:
    if is_float(one.parts[-1]):
        raise NotModelled(f"{one}: not modelled")
    product = _mul(one)
    bits = product.bits[0] * (2 if one.parts[1] == "wide" else 1)
    return Operation(lambda a, b, c: product.function(a, b) + c, (*product.bits, bits))


def _div(one: Instruction) -> Operation:
    kind = one.parts[-1]
    if is_float(kind):
        return _elementwise(one, np.divide, 2)
    _modifiers(one)
    bits = type_bits(kind)
    return Operation(lambda a, b: divide(a, b, kind[0] == "s"), (bits, bits))


def _rem(one: Instruction) -> Operation:
    divided = _div(one)
    return Operation(lambda a, b: a - divided.function(a, b) * b, divided.bits)


def _extreme(one: Instruction, ordinary: Callable[..., Array], without_nan: Callable[..., Array]) -> Operation:
    """``min`` or ``max``: of floats, the one that is no NaN; with ``.NaN``, a NaN."""
    prefers_numbers = is_float(one.parts[-1]) and "NaN" not in one.parts
    return _elementwise(one, without_nan if prefers_numbers else ordinary, 2, "NaN")


def _shift(one: Instruction) -> Operation:
    _modifiers(one)
    kind, left = one.parts[-1], one.parts[0] == "shl"
    return Operation(shifter(type_bits(kind), left, kind[0] == "s"), (type_bits(kind), 32))


def _bfe(one: Instruction) -> Operation:
    _modifiers(one)
    kind = one.parts[-1]
    return Operation(field_extractor(type_bits(kind), kind[0] == "s"), (type_bits(kind), 32, 32))


def _shf(one: Instruction) -> Operation:
    if len(one.parts) != 4 or one.parts[1] not in "lr" or one.parts[2] not in ("wrap", "clamp"):
        raise NotModelled(f"{one}: not modelled")
    return Operation(funnel_shifter(one.parts[1] == "l", one.parts[2] == "wrap"), (32, 32, 32))


def _bitwise(one: Instruction, function: Callable[..., Array], count: int) -> Operation:
    _modifiers(one)
    return Operation(function, (type_bits(one.parts[-1]),) * count)


def _only(one: Instruction, name: str, function: Callable[..., Array], count: int) -> Operation:
    """An instruction that is modelled in one form alone."""
    if one.name != name:
        raise NotModelled(f"{one}: only {name} is modelled")
    return Operation(function, (32,) * count)


def _setp(one: Instruction) -> Operation:
    """A comparison, combined with a third predicate if one is named. A comparison of pairs gives two results."""
    _, name, *rest = one.parts
    kind = rest[-1]
    combine = [part for part in rest[:-1] if part != "ftz"]
    if len(combine) > 1 or "ftz" in rest and kind != "f32":
        raise NotModelled(f"{one}: not modelled")
    compare = _comparison(one, name, kind, "ftz" in rest)
    bits = type_bits(kind)
    if kind in PAIRS:
        if combine:
            raise NotModelled(f"{one}: not modelled")
        return Operation(lambda a, b: tuple(np.moveaxis(compare(a, b), -1, 0)), (bits, bits))
    if not combine:
        return Operation(compare, (bits, bits))
    joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    if combine[0] not in joins:
        raise NotModelled(f"{one}: not modelled")
    return Operation(lambda a, b, c: joins[combine[0]](compare(a, b), c), (bits, bits, 1))


def _comparison(one: Instruction, name: str, kind: str, ftz: bool) -> Callable[[Array, Array], Array]:
    plain = reader(kind)
    read = (lambda value: flush(plain(value))) if ftz else plain
    if not is_float(kind):
        basic = UNSIGNED_COMPARISONS.get(name, name)
        if basic not in COMPARISONS:
            raise NotModelled(f"{one}: not modelled")
        return lambda a, b: COMPARISONS[basic](read(a), read(b))
    if name in ("nan", "num"):
        wanted = name == "nan"
        return lambda a, b: (np.isnan(read(a)) | np.isnan(read(b))) == wanted
    # With "u" behind it, a comparison holds for NaN as well; without, it never does.
    unordered = name.endswith("u")
    basic = name[:-1] if unordered else name
    if basic not in COMPARISONS:
        raise NotModelled(f"{one}: not modelled")

    def compare(a: Array, b: Array) -> Array:
        a, b = read(a), read(b)
        nan = np.isnan(a) | np.isnan(b)
        holds = COMPARISONS[basic](a, b)
        return holds | nan if unordered else holds & ~nan

    return compare


def _selp(one: Instruction) -> Operation:
    _modifiers(one)
    bits = type_bits(one.parts[-1])
    return Operation(lambda a, b, chosen: np.where(chosen, a, b), (bits, bits, 1))


def _cvt(one: Instruction) -> Operation:
    if len(one.parts) < 3:
        raise NotModelled(f"{one}: not modelled")
    to, source = one.parts[-2:]
    modes = set(one.parts[1:-2])
    bits, read = type_bits(source), reader(source)
    if to in PAIRS and PAIRS[to][1] == 32:
        if modes != {"rn"} or source != "f32":
            raise NotModelled(f"{one}: not modelled")
        write = FLOATS[PAIRS[to][0]][1]
        # The first operand becomes the upper half.
        return Operation(lambda a, b: (write(as_f32(a)).astype(U32) << U32(16)) | write(as_f32(b)), (32, 32))
    if to in FLOATS:
        if not modes <= {"rn"} or (source not in FLOATS and bits == 64):
            raise NotModelled(f"{one}: not modelled")
        write = FLOATS[to][1]
        # An integer of at most 32 bits is exact in float64.
        exact = read if source in FLOATS else (lambda value: read(value).astype(np.float64))
        return Operation(lambda a: write(exact(a)), (bits,))
    wide = type_bits(to)
    if wide not in UNSIGNED or to in PAIRS:
        raise NotModelled(f"{one}: not modelled")
    target = SIGNED[wide] if to[0] == "s" else UNSIGNED[wide]
    if source in FLOATS:
        return Operation(_to_integer(one, modes, target, read), (bits,))
    if modes or bits not in UNSIGNED:
        raise NotModelled(f"{one}: not modelled")
    kind = SIGNED[bits] if source[0] == "s" else UNSIGNED[bits]
    return Operation(lambda a: a.astype(UNSIGNED[bits]).view(kind).astype(target).view(UNSIGNED[wide]), (0,))


def _to_integer(one: Instruction, modes: set[str], target: Any, read: Callable[[Array], Array]) -> Callable:
    """Rounds floats to integers: NaN becomes 0, and numbers beyond the range become its ends."""
    if len(modes) != 1 or not modes <= ROUNDINGS.keys() or np.dtype(target).itemsize == 8:
        raise NotModelled(f"{one}: not modelled")
    rounding, limits = ROUNDINGS[next(iter(modes))], np.iinfo(target)
    unsigned = UNSIGNED[8 * np.dtype(target).itemsize]

    def convert(a: Array) -> Array:
        value = read(a).astype(np.float64)
        value = np.where(np.isnan(value), 0.0, rounding(value))
        return np.clip(value, limits.min, limits.max).astype(target).view(unsigned)

    return convert


def _unary(one: Instruction, function: Callable[..., Array]) -> Operation:
    return _elementwise(one, function, 1)


OPERATIONS: dict[str, Callable[[Instruction], Operation]] = {
    "add": lambda one: _elementwise(one, _sum, 2),
    "sub": lambda one: _elementwise(one, _difference, 2),
    "mul": _mul,
    "mad": _mad,
    "fma": lambda one: _elementwise(one, fused, 3),
    "div": _div,
    "rem": _rem,
    "neg": lambda one: _unary(one, np.negative),
    "abs": lambda one: _unary(one, np.abs),
    "min": lambda one: _extreme(one, np.minimum, np.fmin),
    "max": lambda one: _extreme(one, np.maximum, np.fmax),
    "ex2": lambda one: _unary(one, np.exp2),
    "lg2": lambda one: _unary(one, np.log2),
    "rcp": lambda one: _unary(one, np.reciprocal),
    "rsqrt": lambda one: _unary(one, lambda value: np.reciprocal(np.sqrt(value))),
    "and": lambda one: _bitwise(one, np.bitwise_and, 2),
    "or": lambda one: _bitwise(one, np.bitwise_or, 2),
    "xor": lambda one: _bitwise(one, np.bitwise_xor, 2),
    "not": lambda one: _bitwise(one, np.invert, 1),
    "shl": _shift,
    "shr": _shift,
    "shf": _shf,
    "bfe": _bfe,
    "bfi": lambda one: _only(one, "bfi.b32", insert_field, 4),
    "prmt": lambda one: _only(one, "prmt.b32", permute, 3),
    "lop3": lambda one: _only(one, "lop3.b32", logic_of_three, 4),
    "setp": _setp,
    "selp": _selp,
    "cvt": _cvt,
}


def operation_of(one: Instruction) -> Operation:
    """Returns what an instruction computes. Raises NotModelled for what is not listed."""
    if one.parts[0] not in OPERATIONS:
        raise NotModelled(f"{one}: this instruction is not modelled")
    return OPERATIONS[one.parts[0]](one)
