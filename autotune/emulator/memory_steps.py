"""Steps of loads, stores, asynchronous copies and barriers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import NotModelled
from .floats import U32, Array
from .global_memory import WORDS
from .number_types import type_bits
from .parser import Address, Instruction, Number, Register, Symbol, Vector
from .state import Mask, State, Step, extended
from .thread_steps import computed

# Modifiers that change how fast an access is, not what it does.
HINTS = {"nc", "v2", "v4", "v8", "L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::no_allocate"}
HINTS |= {"L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::64B", "L2::128B", "L2::256B"}
SPACES = {"global", "shared", "param"}


def _space(one: Instruction, data: int) -> tuple[str, int]:
    """The memory that an access goes to, and the bytes of a word. data: the place of the registers in the operands."""
    parts = one.parts[1:-1]
    space = parts[0] if parts else ""
    if space not in SPACES or set(parts[1:]) - HINTS or len(one.operands) != 2:
        raise NotModelled(f"{one}: not modelled")
    width = type_bits(one.parts[-1]) // 8
    if width not in WORDS:
        raise NotModelled(f"{one}: words of {width} bytes are not modelled")
    vector = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
    if len(_items(one.operands[data])) != vector:
        raise NotModelled(f"{one}: {vector} registers are wanted")
    return space, width


def _items(operand: Any) -> tuple[Any, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def load(state: State, one: Instruction) -> Step:
    """Reads registers from global or shared memory, or a parameter."""
    space, width = _space(one, 0)
    targets, kind = _items(one.operands[0]), one.parts[-1]
    if any(not isinstance(target, Register | None) for target in targets):
        raise NotModelled(f"{one}: the result must be a register")
    if space == "param":
        return _load_param(state, one, width)
    fetch, narrow = _fetcher(state, one, space, width, len(targets)), state.guarded(one)

    def step(mask: Mask) -> None:
        mask = narrow(mask)
        if mask is not None and not mask.any():
            return
        for target, value in zip(targets, fetch(mask), strict=True):
            if target is not None:
                state.put(target, extended(value, kind, target.bits), mask)

    return step


def _fetcher(state: State, one: Instruction, space: str, width: int, count: int) -> Callable[[Mask], list[Array]]:
    """Returns what reads the words of an access, after all checks."""
    address, size = state.address(one.operands[1], 64 if space == "global" else 32, one), width * count

    def from_global(mask: Mask) -> list[Array]:
        addresses = address()
        offsets = state.memory.place(addresses, size, mask)
        if state.check:
            state.memory.check_read(offsets, size, state.who, mask)
        if state.counts is not None:
            state.counts.global_access(one, addresses, size, mask)
        return state.memory.load(offsets, width, count)

    def from_shared(mask: Mask) -> list[Array]:
        offsets = state.shared.place(address(), size, mask)
        if state.check:
            state.shared.read(offsets, size, state.thread, mask)
        if state.counts is not None:
            state.counts.shared_access(one, offsets, size, mask)
        return state.shared.load(offsets, width, count)

    return from_global if space == "global" else from_shared


def _load_param(state: State, one: Instruction, width: int) -> Step:
    target, address = one.operands
    view, kind = state.param_bytes.view(WORDS[width]), one.parts[-1]
    if not isinstance(address, Address):
        raise NotModelled(f"{one}: not modelled")
    if isinstance(address.base, Symbol):
        place = state.param_places[address.base.name] + address.offset
        value = view[place // width].reshape(1, 1)
        return computed(state, one, target, lambda: value, [], kind)

    def read(places: Array) -> Array:
        # The address of a thread that is not here means nothing.
        places = (places.astype(np.int64) + address.offset) // width
        return view[np.where((places >= 0) & (places < len(view)), places, 0)]

    return computed(state, one, target, read, [address.base.index], kind)


def store(state: State, one: Instruction) -> Step:
    """Writes registers to global or shared memory."""
    space, width = _space(one, 1)
    sources = _items(one.operands[1])
    # A register may be wider than what is stored of it.
    places = [state.source(item, item.bits if isinstance(item, Register) else 8 * width, one) for item in sources]
    if space == "param":
        raise NotModelled(f"{one}: not modelled")
    address = state.address(one.operands[0], 64 if space == "global" else 32, one)
    narrow, size = state.guarded(one), width * len(sources)

    def to_global(values: list[Array], mask: Mask) -> None:
        addresses = address()
        offsets = state.memory.place(addresses, size, mask)
        state.memory.store(offsets, values, width, state.who, mask)
        if state.counts is not None:
            state.counts.global_access(one, addresses, size, mask)

    def to_shared(values: list[Array], mask: Mask) -> None:
        offsets = state.shared.place(address(), size, mask)
        twice = state.check and state.shared.write(offsets, size, state.thread, mask)
        if state.counts is not None:
            state.counts.shared_access(one, offsets, size, mask)
        state.shared.store(offsets, values, width, mask, twice)

    put = to_global if space == "global" else to_shared

    def step(mask: Mask) -> None:
        mask = narrow(mask)
        if mask is None or mask.any():
            put([state.registers[place] for place in places], mask)

    return step


def copy(state: State, one: Instruction) -> Step:
    """Copies from global to shared memory asynchronously; ends a group of copies, or waits for groups."""
    if one.name == "cp.async.commit_group" and one.guard is None:
        return state.shared.commit
    if one.name in ("cp.async.wait_group", "cp.async.wait_all") and one.guard is None:
        pending = one.operands[0].value if one.operands else 0
        return lambda mask: state.shared.wait(pending, mask)
    kind = one.parts[1:3]
    if kind not in (["async", "ca"], ["async", "cg"]) or one.parts[3:5] != ["shared", "global"]:
        raise NotModelled(f"{one}: not modelled")
    if set(one.parts[5:]) - HINTS or len(one.operands) not in (3, 4) or not isinstance(one.operands[2], Number):
        raise NotModelled(f"{one}: not modelled")
    width, narrow = one.operands[2].value, state.guarded(one)
    to, source = state.address(one.operands[0], 32, one), state.address(one.operands[1], 64, one)
    size = state.source(one.operands[3], 32, one) if len(one.operands) > 3 else None

    def step(mask: Mask) -> None:
        mask = narrow(mask)
        if mask is not None and not mask.any():
            return
        offsets = state.shared.place(to(), width, mask)
        reads = mask if size is None else _readers(one, state.registers[size], width, mask)
        addresses = source()
        places = state.memory.place(addresses, width, reads)
        if state.check:
            state.memory.check_read(places, width, state.who, reads)
        twice = state.check and state.shared.start_copy(offsets, width, state.thread, mask)
        if state.counts is not None:
            state.counts.global_access(one, addresses, width, reads)
            state.counts.shared_access(one, offsets, width, mask)
        words = state.memory.load(places, 4, width // 4)
        if reads is not None:
            words = [np.where(reads, word, U32(0)) for word in words]
        state.shared.store(offsets, words, 4, mask, twice)

    return step


def _readers(one: Instruction, sizes: Array, width: int, mask: Mask) -> Mask:
    """The threads that copy anything: one that is told to copy no bytes writes zeros, and reads nothing."""
    partly = (sizes != 0) & (sizes != width)
    if (partly if mask is None else partly & mask).any():
        raise NotModelled(f"{one}: copies of a part are not modelled")
    reads = sizes != 0 if mask is None else (sizes != 0) & mask
    return mask if reads.all() else reads


def barrier(state: State, one: Instruction) -> Step:
    """Lets the threads of a block, or of each warp, wait for each other."""
    if one.guard is None and len(one.operands) == 1 and isinstance(one.operands[0], Number):
        if one.name == "bar.warp.sync" and one.operands[0].value & 0xFFFFFFFF == 0xFFFFFFFF:
            return lambda mask: state.shared.barrier(state.whole_blocks(mask), warps_only=True)
        if one.name in ("bar.sync", "barrier.sync"):
            return lambda mask: state.shared.barrier(state.whole_blocks(mask))
    raise NotModelled(f"{one}: not modelled")


def fence(state: State, one: Instruction) -> Step:
    """Makes writes to shared memory visible to instructions that read it asynchronously."""
    if one.name not in ("fence.proxy.async", "fence.proxy.async.shared::cta") or one.guard is not None:
        raise NotModelled(f"{one}: not modelled")
    return state.shared.fence
