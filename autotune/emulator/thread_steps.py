"""Steps of instructions without memory: arithmetic, moves, special registers, and shuffles within a warp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .bit_operations import UNSIGNED
from .faults import NotModelled
from .floats import U32, Array
from .number_types import type_bits
from .operations import operation_of
from .parser import Instruction, Number, Pair, Register, Special, Vector
from .state import WARP, Mask, State, Step, extended, with_garbage

ALL_LANES = 0xFFFFFFFF


def arithmetic(state: State, one: Instruction) -> Step:
    """Computes one register, or two predicates, of others."""
    operation = operation_of(one)
    target, *operands = one.operands
    if len(operands) != len(operation.bits):
        raise NotModelled(f"{one}: {len(operation.bits)} operands are modelled")
    function = with_garbage(operation.function, 32) if one.parts[0] == "prmt" else operation.function
    sources = [state.source(operand, bits, one) for operand, bits in zip(operands, operation.bits, strict=True)]
    if isinstance(target, Pair):
        return _two_results(state, one, function, sources)
    kind = one.parts[1 if one.parts[0] == "setp" else -2 if one.parts[0] == "cvt" else -1]
    return computed(state, one, target, function, sources, kind)


def computed(
    state: State, one: Instruction, target: Any, function: Callable[..., Array], sources: list[int], kind: str = "b"
) -> Step:
    """Sets a register to a function of others. kind: the type of the result, for a register that is wider."""
    if not isinstance(target, Register):
        raise NotModelled(f"{one}: the result must be a register")
    registers, index, bits = state.registers, target.index, target.bits
    narrow, fits = state.guarded(one), max(1, bits // 8)
    if one.guard is None and len(sources) == 2:
        first, second = sources

        def step_of_two(mask: Mask) -> None:
            value = function(registers[first], registers[second])
            if mask is None and value.dtype.itemsize == fits:
                registers[index] = value
            else:
                state.put(target, extended(value, kind, bits), mask)

        return step_of_two

    def step(mask: Mask) -> None:
        value = function(*[registers[source] for source in sources])
        state.put(target, extended(value, kind, bits), narrow(mask))

    return step


def _two_results(state: State, one: Instruction, function: Callable[..., Any], sources: list[int]) -> Step:
    targets, narrow = one.operands[0].items, state.guarded(one)
    if not one.parts[-1].endswith("x2"):
        raise NotModelled(f"{one}: two results are modelled for pairs of numbers only")

    def step(mask: Mask) -> None:
        mask = narrow(mask)
        found = function(*(state.registers[source] for source in sources))
        for target, value in zip(targets, found, strict=True):
            state.put(target, value, mask)

    return step


def move(state: State, one: Instruction) -> Step:
    """Copies a register, takes one apart, puts one together, or reads a special one."""
    if len(one.parts) != 2:
        raise NotModelled(f"{one}: not modelled")
    target, source = one.operands
    bits = type_bits(one.parts[-1])
    if isinstance(target, Vector):
        return _taken_apart(state, one, bits)
    if isinstance(source, Vector):
        part = bits // len(source.items)
        places = [state.source(item, part, one) for item in source.items]
        joined = with_garbage(lambda *values: _joined(values, part, bits), part)
        return computed(state, one, target, joined, places)
    if isinstance(source, Special):
        value = _special(state, source.name, one).astype(UNSIGNED[bits])
        return computed(state, one, target, lambda: value, [])
    return _copied(state, one, target, state.source(source, bits, one))


def _copied(state: State, one: Instruction, target: Any, source: int) -> Step:
    """Copies one register. One that nobody has set stays so: a compiler copies what nobody looks at."""
    plain = computed(state, one, target, lambda value: value, [source])

    def step(mask: Mask) -> None:
        if state.registers[source] is not None:
            plain(mask)
        elif mask is None and one.guard is None:
            state.registers[target.index] = None

    return step


def _taken_apart(state: State, one: Instruction, bits: int) -> Step:
    items = one.operands[0].items
    part, index, narrow = bits // len(items), state.source(one.operands[1], bits, one), state.guarded(one)

    def step(mask: Mask) -> None:
        value = state.registers[index]
        mask = narrow(mask)
        for place, item in enumerate(items):
            if item is not None:
                state.put(item, (value >> value.dtype.type(part * place)).astype(UNSIGNED[part]), mask)

    return step


def _joined(values: Sequence[Array], part: int, bits: int) -> Array:
    kind = UNSIGNED[bits]
    total = values[0].astype(kind)
    for place, value in enumerate(values[1:], start=1):
        total = total | (value.astype(kind) << kind(part * place))
    return total


def _special(state: State, name: str, one: Instruction) -> Array:
    kind, _, axis = name.partition(".")
    place = "xyz".index(axis or "x")
    if kind == "tid":
        return state.thread if place == 0 else np.zeros((1, 1), dtype=U32)
    if kind == "ctaid":
        return state.block_ids[:, place, None]
    if kind == "laneid":
        return state.thread % U32(WARP)
    if kind not in ("ntid", "nctaid"):
        raise NotModelled(f"{one}: not modelled")
    return np.full((1, 1), ((state.threads, 1, 1) if kind == "ntid" else state.grid)[place], dtype=U32)


def shuffle(state: State, one: Instruction) -> Step:
    """Exchanges a register among the threads of each warp: ``shfl.sync`` with all 32 threads."""
    if one.parts[1] != "sync" or one.parts[-1] != "b32" or len(one.operands) != 5 or one.guard is not None:
        raise NotModelled(f"{one}: not modelled")
    mode, (target, *sources, members) = one.parts[2], one.operands
    if not isinstance(members, Number) or members.value & ALL_LANES != ALL_LANES or not isinstance(target, Register):
        raise NotModelled(f"{one}: not modelled")
    if mode not in ("idx", "bfly", "up", "down"):
        raise NotModelled(f"{one}: not modelled")
    value, by, limits = (state.source(item, 32, one) for item in sources)

    def step(mask: Mask) -> None:
        state.whole_blocks(mask)
        lanes = _source_lanes(mode, state.thread % U32(WARP), state.registers[by] & U32(31), state.registers[limits])
        places = (state.thread // U32(WARP) * U32(WARP)).astype(np.int64) + lanes
        words = state.registers[value]
        words = np.broadcast_to(words, (words.shape[0], state.threads))
        places = np.broadcast_to(places, (places.shape[0], state.threads))
        if places.shape[0] == 1:
            found = words[:, places[0]]
        else:
            found = np.broadcast_to(words, places.shape)[np.arange(places.shape[0])[:, None], places]
        state.put(target, found, mask)

    return step


def _source_lanes(mode: str, own: Array, by: Array, limits: Array) -> Array:
    """The lane that each lane reads. limits: the last lane of a segment, and above it the mask of segments."""
    segment, most = (limits >> U32(8)) & U32(31), limits & U32(31)
    last = ((own & segment) | (most & ~segment)).astype(np.int64)
    if mode == "idx":
        source = (own & segment) | (by & ~segment)
    elif mode == "bfly":
        source = own ^ by
    else:
        source = own - by if mode == "up" else own + by
    source = source.view(np.int32).astype(np.int64)
    return np.where(source >= last if mode == "up" else source <= last, source, own.astype(np.int64))
