"""Control flow: threads and blocks that part and meet again; errors that name their instruction."""

import numpy as np
import pytest
from ptx_kernels import run

from mebp_triton.autotune.emulator import machine
from mebp_triton.autotune.emulator.faults import Fault, NotModelled


def test_a_loop_that_threads_leave_one_by_one():
    body = """
mov.b32 %r10, 0;
mov.b32 %r11, 0;
$L1:
add.s32 %r11, %r11, %r10;
add.s32 %r10, %r10, 1;
setp.le.s32 %p1, %r10, %r1;
@%p1 bra $L1;
st.global.b32 [%rd3], %r11;
"""
    assert (run(body) == [t * (t + 1) // 2 for t in range(64)]).all()


def test_blocks_that_part_and_meet():
    """A barrier that one block does not reach is none of the others' business."""
    body = """
mov.b32 %r10, 5;
setp.eq.s32 %p1, %r20, 1;
@%p1 bra $L1;
mov.b32 %r10, 7;
st.shared.b32 [%r4], %r10;
bar.sync 0;
$L1:
add.s32 %r10, %r10, 1;
bar.sync 0;
st.global.b32 [%rd3], %r10;
"""
    assert run(body)[:, 0].tolist() == [8, 6, 8]


def test_threads_that_return_early():
    body = "setp.lt.s32 %p1, %r1, 7;\n@!%p1 bra $L1;\nret;\n$L1:\nst.global.b32 [%rd3], %r1;\n"
    assert (run(body)[1] == np.where(np.arange(64) < 7, 0, np.arange(64))).all()


def test_an_endless_loop(monkeypatch):
    monkeypatch.setattr(machine, "MOST_STEPS", 1000)
    with pytest.raises(Fault, match="too many instructions") as caught:
        run("$L1:\nbra $L1;\n")
    assert caught.value.kind == "endless"


def test_the_first_fault_is_described_once():
    with pytest.raises(Fault) as caught:
        run("ld.shared.b32 %r7, [%r4+2];\n")
    assert str(caught.value).count("misaligned") == 1 and caught.value.instruction.name == "ld.shared.b32"
    assert str(caught.value).endswith("ld.shared.b32 %r7, [%r4+2]")


def test_nothing_runs_if_an_instruction_is_not_modelled():
    with pytest.raises(NotModelled, match="elect.sync"):
        run("ld.shared.b32 %r7, [%r4+2];\nelect.sync %r9|%p1, -1;\n")


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("ret", "@%p1 ret;"),
        ("brx.idx", "brx.idx %r1, $L1;\n$L1:"),
        ("mov.b32 5", "mov.b32 5, %r1;"),
        ("ld.global", "ld.global.b32 %r7, %rd3;"),
        ("bra.div", "bra.div $L1;\n$L1:"),
    ],
)
def test_other_forms_are_refused_by_name(name, body):
    with pytest.raises(NotModelled, match=name):
        run("setp.eq.s32 %p1, %r1, 0;\n" + body + "\n")


def test_small_numbers_of_blocks():
    assert run("st.global.b32 [%rd3], %r1;\n", blocks=1).tolist() == [list(range(64))]
