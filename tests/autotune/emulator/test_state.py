"""Registers, numbers, parameters and masks."""

import numpy as np
import pytest
from ptx_kernels import instruction, kernel_of

from mebp_triton.autotune.emulator.faults import Fault, NotModelled
from mebp_triton.autotune.emulator.global_memory import GlobalMemory
from mebp_triton.autotune.emulator.parser import Kernel, Number, Register, Symbol
from mebp_triton.autotune.emulator.state import State, all_blocks, extended, with_garbage

ONE = instruction("mov.b32")


def state_of(kernel, params, grid=(2, 3, 1)):
    memory = GlobalMemory()
    memory.ready()
    return State(kernel, grid, params, memory)


@pytest.fixture
def state():
    return state_of(kernel_of("st.shared.v2.b16 [%r4], {%rs1, %rs2};"), [0x1234])


def test_blocks_in_the_order_of_a_launch(state):
    assert all_blocks((2, 3, 1)).tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 2, 0], [1, 2, 0]]
    assert state.shape == (6, 64) and state.who[5, 63] == 6 * 64 - 1
    assert all_blocks((0, 1, 1)).shape == (0, 3)


def test_parameters_lie_one_behind_the_other():
    kernel = Kernel("k", params=[("a", 4), ("b", 8), ("c", 4)], threads=32)
    state = state_of(kernel, [-1, 2**40 + 3, 7])
    assert state.param_places == {"a": 0, "b": 8, "c": 16}
    assert state.param_bytes.view(np.uint32).tolist() == [0xFFFFFFFF, 0, 3, 256, 7, 0]


def test_numbers_are_cut_to_what_is_read(state):
    place = state.source(Number(-1), 16, ONE)
    assert state.registers[place].dtype == np.uint16 and state.registers[place] == 0xFFFF
    assert state.source(Number(0xFFFF), 16, ONE) == place
    assert state.registers[state.source(Symbol("global_smem"), 32, ONE)] == 1024


def test_registers_of_another_size_are_refused(state):
    with pytest.raises(NotModelled, match="32 bits where 64"):
        state.source(Register(0, 32), 64, ONE)
    with pytest.raises(NotModelled, match="nothing is not declared"):
        state.source(Symbol("nothing"), 32, ONE)


def test_a_mask_keeps_what_others_have(state):
    register = Register(20, 32)
    state.put(register, np.full((1, 64), 5, dtype=np.uint32), np.arange(64)[None] < 3)
    assert state.registers[20][0, :4].tolist() == [5, 5, 5, 0xA5A5A5A5]


def test_what_all_threads_of_a_block_must_reach(state):
    assert state.whole_blocks(None) is None
    blocks = np.zeros((6, 64), dtype=bool)
    blocks[2:4] = True
    assert state.whole_blocks(blocks).tolist() == [[False], [False], [True], [True], [False], [False]]
    blocks[0, 5] = True
    with pytest.raises(Fault, match="not all threads"):
        state.whole_blocks(blocks)


def test_the_smallest_write_decides_how_finely_races_are_noted(state):
    assert state.shared.unit == 2


def test_results_that_are_narrower_than_their_register():
    assert extended(np.uint8([[0x80]]), "s8", 32) == 0xFFFFFF80 and extended(np.uint8([[0x80]]), "u8", 32) == 0x80
    with pytest.raises(NotModelled, match="does not fit"):
        extended(np.uint64([[1]]), "u64", 32)


def test_bytes_that_nobody_set_may_be_moved():
    joined = with_garbage(lambda a, b: a | b, 16)
    assert joined(None, np.uint16([[0]])) == 0xA5A5


def test_blocks_of_parts_of_warps_are_refused():
    with pytest.raises(NotModelled, match="whole warps of threads, got 48"):
        state_of(kernel_of("", threads=48), [0])
