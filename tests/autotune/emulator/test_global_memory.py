"""Global memory: bounds, gaps, alignment, and races between threads."""

import numpy as np
import pytest

from mebp_triton.autotune.emulator.faults import Fault, NotModelled
from mebp_triton.autotune.emulator.global_memory import GlobalMemory

WHO = np.arange(4)[None]


@pytest.fixture
def memory():
    """Two buffers of 64 and 32 bytes; bytes 16 to 32 of the first belong to nobody."""
    made = GlobalMemory()
    allowed = np.ones(64, dtype=bool)
    allowed[16:32] = False
    made.add("x", np.arange(64, dtype=np.uint8), allowed)
    made.add("y", np.zeros(32, dtype=np.uint8), np.ones(32, dtype=bool), misalignment=4)
    made.ready()
    return made


def at(memory, buffer, *offsets):
    return np.array([[memory.buffers[buffer].address + offset for offset in offsets]], dtype=np.uint64)


def test_what_is_loaded_and_stored(memory):
    places = memory.place(at(memory, 0, 0, 4, 8, 32), 4, None)
    (words,) = memory.load(places, 4, 1)
    assert words.tolist() == [[0x03020100, 0x07060504, 0x0B0A0908, 0x23222120]]
    targets = memory.place(at(memory, 1, 0, 4, 8, 12), 4, None)
    memory.store(targets, [words], 4, WHO, None)
    memory.fetch()
    assert memory.buffers[1].data[:8].tolist() == [*range(8)] and memory.buffers[1].data[16:].sum() == 0


def test_vectors(memory):
    places = memory.place(at(memory, 0, 0, 32), 16, None)
    words = memory.load(places, 4, 4)
    assert len(words) == 4 and words[1].tolist() == [[0x07060504, 0x27262524]]


@pytest.mark.parametrize(("offset", "width"), [(64, 4), (-4, 4), (60, 8), (16, 4), (12, 8), (28, 8), (1 << 40, 4)])
def test_out_of_bounds(memory, offset, width):
    with pytest.raises(
        Fault, match=r"1 threads; the first: block #0, thread 1, . bytes at [xy][+-]\d+ \(of \d\d bytes"
    ) as caught:
        memory.place(at(memory, 0, 0, offset), width, None)
    assert caught.value.kind == "out of bounds"
    assert memory.place(at(memory, 0, 0, offset), width, np.array([[True, False]]))[0, 1] == 0


def test_misaligned(memory):
    with pytest.raises(Fault, match="8 bytes at y") as caught:
        memory.place(at(memory, 1, 0), 8, None)
    assert caught.value.kind == "misaligned"
    memory.place(at(memory, 1, 4), 8, None)


def test_a_read_of_what_another_thread_wrote(memory):
    target = memory.place(at(memory, 1, 0, 4, 8, 12), 4, None)
    memory.store(target, [np.arange(4, dtype=np.uint32)[None]], 4, WHO, None)
    memory.check_read(target, 4, WHO, None)
    with pytest.raises(Fault, match="written by another thread"):
        memory.check_read(target[:, ::-1], 4, WHO, None)
    # The end of a wide read counts as well.
    wide = memory.place(at(memory, 1, 4), 8, None)
    with pytest.raises(Fault, match="another thread"):
        memory.check_read(wide, 8, WHO[:, 1:2], None)


def test_two_writers_of_one_word(memory):
    target = memory.place(at(memory, 1, 0, 0, 0, 0), 4, None)
    same, different = np.full((1, 4), 7, dtype=np.uint32), np.arange(4, dtype=np.uint32)[None]
    with pytest.raises(Fault, match="different values to one word"):
        memory.store(target, [different], 4, WHO, None)
    memory.store(target, [same], 4, WHO + 8, None)
    memory.store(target[:, :1], [same[:, :1]], 4, WHO[:, :1], None)
    with pytest.raises(Fault, match="written differently by two threads"):
        memory.store(target[:, :1], [different[:, :1]], 4, WHO[:, 1:2], None)


def test_single_bytes_are_not_stored(memory):
    with pytest.raises(NotModelled, match="single bytes"):
        memory.store(np.array([[4096]]), [np.uint8([[1]])], 1, WHO[:, :1], None)


def test_pieces_at_addresses_of_their_own():
    memory, far = GlobalMemory(), 1 << 48
    memory.add("x", np.zeros(64, dtype=np.uint8), np.ones(64, dtype=bool))
    memory.add_at("row", np.full(16, 5, dtype=np.uint8), far + 256)
    memory.add_at("next", np.full(16, 6, dtype=np.uint8), far + (1 << 31))
    memory.ready()
    addresses = np.array([[memory.buffers[0].address, far + 260, far + (1 << 31)]], dtype=np.uint64)
    (words,) = memory.load(memory.place(addresses, 4, None), 4, 1)
    assert words.tolist() == [[0, 0x05050505, 0x06060606]]
    with pytest.raises(Fault, match=r"row\+16"):
        memory.place(np.array([[far + 272]], dtype=np.uint64), 4, None)
