"""Moves, arithmetic with guards, special registers and shuffles, in small kernels."""

import numpy as np
import pytest
from ptx_kernels import run

from mebp_triton.autotune.emulator.faults import Fault, NotModelled

STORE = "\nst.global.b32 [%rd3], %r9;\n"
THREAD = np.arange(64)


def test_special_registers():
    assert run("mov.u32 %r9, %ctaid.x;" + STORE)[:, 5].tolist() == [0, 1, 2]
    assert (run("mov.u32 %r9, %laneid;" + STORE)[0] == THREAD % 32).all()
    assert (run("mov.u32 %r9, %ntid.x;" + STORE) == 64).all() and (run("mov.u32 %r9, %nctaid.x;" + STORE) == 3).all()


def test_registers_are_put_together_and_taken_apart():
    body = "cvt.u16.u32 %rs1, %r1;\nmov.b16 %rs2, 7;\nmov.b32 %r8, {%rs1, %rs2};\nmov.b32 {_, %rs3}, %r8;\n"
    assert (run(body + "cvt.u32.u16 %r9, %rs3;\nadd.s32 %r9, %r9, %r8;" + STORE)[0] == (7 << 16 | THREAD) + 7).all()


def test_a_half_that_nobody_set_stays_open():
    body = "mov.b16 %rs2, 7;\nmov.b32 %r8, {%rs1, %rs2};\nshr.u32 %r9, %r8, 16;" + STORE
    assert (run(body) == 7).all()


def test_a_guard_keeps_the_others_as_they_were():
    body = "mov.b32 %r9, 1;\nsetp.lt.s32 %p1, %r1, 10;\n@%p1 add.s32 %r9, %r1, 5;\n@!%p1 mov.b32 %r9, 2;" + STORE
    assert (run(body)[0] == np.where(THREAD < 10, THREAD + 5, 2)).all()


def test_a_register_that_nobody_set():
    with pytest.raises(Fault, match=r"undefined register: nobody has set %r50\n  at line \d+ .*add.s32"):
        run("add.s32 %r9, %r50, 1;")
    with pytest.raises(Fault, match="nobody has set %r51"):
        run("setp.eq.s32 %p1, %r1, 0;\nselp.b32 %r9, %r51, %r1, %p1;")
    # To copy it is no fault; to use the copy is one.
    with pytest.raises(Fault, match="nobody has set %r8"):
        run("mov.b32 %r8, %r50;\nadd.s32 %r9, %r8, 1;")


def test_a_comparison_with_two_results():
    body = "mov.b32 %r7, 0x3F804000;\nmov.b32 %r8, 0x40003F80;\nsetp.lt.bf16x2 %p1|%p2, %r7, %r8;\n"
    body += "selp.b32 %r9, 1, 0, %p1;\n@%p2 add.s32 %r9, %r9, 2;" + STORE
    # Lower halves: 2 < 1. Upper halves: 1 < 2.
    assert (run(body) == 2).all()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("bfly.b32 %r9, %r1, 4, 31", THREAD ^ 4),
        ("up.b32 %r9, %r1, 3, 0", np.where(THREAD % 32 < 3, THREAD, THREAD - 3)),
        ("down.b32 %r9, %r1, 3, 31", np.where(THREAD % 32 > 28, THREAD, THREAD + 3)),
        ("idx.b32 %r9, %r1, 5, 31", THREAD // 32 * 32 + 5),
        # Segments of eight lanes.
        ("idx.b32 %r9, %r1, 5, 0x181F", THREAD // 8 * 8 + 5),
        ("down.b32 %r9, %r1, 3, 0x181F", np.where(THREAD % 8 > 4, THREAD, THREAD + 3)),
    ],
)
def test_shuffles(text, wanted):
    assert (run(f"shfl.sync.{text}, -1;" + STORE)[1] == wanted).all()


@pytest.mark.parametrize(
    "text",
    [
        "shfl.sync.bfly.b32 %r9, %r1, 4, 31, 15;",
        "shfl.sync.bfly.b32 %r9|%p1, %r1, 4, 31, -1;",
        "add.s32 %r9, %r1;",
        "mov.b32 %r9, %tid.w;",
        "mov.b32 %r9, %clock;",
        "setp.lt.s32 %p1|%p2, %r1, %r1;",
        "vote.sync.any.pred %p1, %p2, -1;",
    ],
)
def test_what_is_not_modelled(text):
    with pytest.raises(NotModelled, match=r"line \d+"):
        run(text)
