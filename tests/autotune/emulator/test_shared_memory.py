"""Shared memory: who may read and write what, after which barrier."""

import numpy as np
import pytest

from mebp_triton.autotune.emulator.faults import Fault
from mebp_triton.autotune.emulator.shared_memory import SharedMemory

WHO = np.arange(64, dtype=np.uint32)[None]
OWN = np.arange(64, dtype=np.int64)[None] * 4
NEIGHBOUR = OWN ^ 4
OTHER_WARP = OWN ^ 128
VALUES = np.arange(64, dtype=np.uint32)[None]


@pytest.fixture
def memory():
    return SharedMemory(2, 0, 256, 64, 4)


def write(memory, offsets=OWN, values=VALUES, mask=None):
    twice = memory.write(offsets, 4, WHO, mask)
    memory.store(offsets, [values], 4, mask, twice)


def read(memory, offsets=OWN, mask=None):
    memory.read(offsets, 4, WHO, mask)
    return memory.load(offsets, 4, 1)[0]


def test_an_exchange(memory):
    write(memory)
    assert (read(memory) == VALUES).all()
    with pytest.raises(Fault, match="thread 1 was there with no barrier in between") as caught:
        read(memory, NEIGHBOUR)
    assert caught.value.kind == "shared race"
    memory.barrier(None, warps_only=True)
    assert (read(memory, NEIGHBOUR) == VALUES ^ 1).all()
    with pytest.raises(Fault, match="thread 32 was there"):
        read(memory, OTHER_WARP)
    memory.barrier(None)
    assert (read(memory, OTHER_WARP) == VALUES ^ 32).all()


def test_a_write_over_what_others_read(memory):
    write(memory)
    memory.barrier(None)
    read(memory, OTHER_WARP)
    with pytest.raises(Fault, match="write after read of byte 0: thread 32"):
        write(memory)
    memory.barrier(None)
    write(memory)


def test_many_readers_of_one_word(memory):
    write(memory)
    memory.barrier(None)
    read(memory, np.zeros((1, 64), dtype=np.int64))
    with pytest.raises(Fault, match="several threads"):
        write(memory)
    memory.barrier(None, warps_only=True)
    # The other warp has read it too, and a warp's barrier does not order that.
    with pytest.raises(Fault, match="several threads"):
        write(memory)


def test_readers_of_one_warp_are_ordered_by_its_barrier(memory):
    write(memory)
    memory.barrier(None)
    first_warp = WHO < 32
    read(memory, np.zeros((1, 64), dtype=np.int64), first_warp)
    memory.barrier(None, warps_only=True)
    write(memory, mask=first_warp)


def test_writes_to_one_word(memory):
    with pytest.raises(Fault, match="different values to one word"):
        write(memory, np.zeros((1, 64), dtype=np.int64))
    same = SharedMemory(2, 0, 256, 64, 4)
    write(same, np.zeros((1, 64), dtype=np.int64), np.zeros((1, 64), dtype=np.uint32))


def test_what_nobody_wrote(memory):
    with pytest.raises(Fault, match="that nobody wrote") as caught:
        read(memory)
    assert caught.value.kind == "uninitialised"


@pytest.mark.parametrize(("offset", "width", "kind"), [(256, 4, "out of bounds"), (-4, 4, "out of bounds")])
def test_bounds(memory, offset, width, kind):
    with pytest.raises(Fault) as caught:
        memory.place(np.array([[0, offset]]), width, None)
    assert caught.value.kind == kind
    memory.place(np.array([[0, offset]]), width, np.array([[True, False]]))


def test_what_lies_before_the_start_is_out_of_bounds():
    memory = SharedMemory(2, 128, 256, 64, 4)
    assert memory.place(np.array([[128, 0]]), 4, np.array([[True, False]])).tolist() == [[128, 128]]
    with pytest.raises(Fault, match="-4 of 128 bytes"):
        memory.place(np.array([[124]]), 4, None)


def test_alignment(memory):
    with pytest.raises(Fault, match="8 bytes at 4") as caught:
        memory.place(np.array([[4]]), 8, None)
    assert caught.value.kind == "misaligned"


def test_blocks_that_do_different_things(memory):
    """Only the first block writes; only it may read."""
    first = np.array([[True], [False]])
    write(memory, mask=np.broadcast_to(first, (2, 64)))
    memory.barrier(first)
    read(memory, OTHER_WARP, np.broadcast_to(first, (2, 64)))
    with pytest.raises(Fault, match="block #1.*nobody wrote"):
        read(memory)


def copy(memory, mask=None):
    memory.start_copy(OWN, 4, WHO, mask)
    memory.store(OWN, [VALUES], 4, mask)


def test_an_asynchronous_copy(memory):
    copy(memory)
    for touch in (read, write):
        with pytest.raises(Fault, match="on its way"):
            touch(memory)
    memory.commit(None)
    memory.wait(0, None)
    read(memory)
    with pytest.raises(Fault, match="no barrier"):
        read(memory, NEIGHBOUR)
    memory.barrier(None)
    read(memory, NEIGHBOUR)
    assert not memory.copies


def test_groups_of_copies_arrive_in_order(memory):
    half = WHO < 32
    copy(memory, half)
    memory.commit(None)
    copy(memory, ~half)
    memory.commit(None)
    memory.wait(1, None)
    read(memory, mask=half)
    with pytest.raises(Fault, match="on its way"):
        read(memory, mask=~half)
    memory.wait(0, None)
    read(memory)


def test_asynchronous_reads(memory):
    write(memory)
    memory.barrier(None)
    rows, leader = OWN[:, ::4], WHO[:, ::4]
    with pytest.raises(Fault, match="no proxy fence"):
        memory.start_read(rows, 16, leader, None)
    memory.fence(None)
    memory.start_read(rows, 16, leader, None)
    memory.barrier(None)
    with pytest.raises(Fault, match="on its way"):
        write(memory)
    memory.end_read(rows, 16, None)
    with pytest.raises(Fault, match="several threads"):
        write(memory)
    memory.barrier(None)
    write(memory)


def test_a_read_that_goes_on(memory):
    write(memory)
    memory.barrier(None)
    memory.fence(None)
    rows = OWN[:, ::4]
    memory.start_read(rows, 16, WHO[:, ::4], None)
    memory.end_read(rows, 16, None)
    memory.keep_read(rows, 16, None)
    memory.barrier(None)
    with pytest.raises(Fault, match="on its way"):
        write(memory)
