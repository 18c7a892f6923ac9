"""Asynchronous products of four warps: right ones, and what goes wrong around them."""

import numpy as np
import pytest
from ptx_kernels import run

from mebp_triton.autotune.emulator.faults import Fault, NotModelled

# B is 8 x 16 numbers in two blocks of eight rows of 16 bytes, 128 bytes apart. Row n of block c holds the numbers
# 1 + n in bfloat16, written by thread 8c + n. A is in registers: all ones.
WRITE = """
add.s32 %r9, %r1, 0;
and.b32 %r10, %r1, 7;
add.s32 %r10, %r10, 1;
cvt.rn.f32.s32 %r10, %r10;
cvt.rn.bf16x2.f32 %r10, %r10, %r10;
shl.b32 %r11, %r1, 4;
add.s32 %r11, %r11, %r3;
setp.lt.s32 %p1, %r1, 16;
@%p1 st.shared.v4.b32 [%r11], {%r10, %r10, %r10, %r10};
"""
FENCE = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
# Start 1024; 128 bytes to the next columns; 128 to the next rows, of which there are none.
PRODUCT = """
mov.b64 %rd5, 0x0000000800080040;
mov.b32 %r30, 0x3F803F80;
mov.pred %p2, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 { %r40, %r41, %r42, %r43 }, { %r30, %r30, %r30, %r30 }, %rd5,
    %p2, 1, 1, 0;
wgmma.commit_group.sync.aligned;
"""
WAIT = "wgmma.wait_group.sync.aligned 0;\n"
STORE = "st.global.b32 [%rd3], %r41;\n"


def compute(body, blocks=2):
    return run(body, blocks=blocks, threads=128).view(np.float32)


def test_a_product():
    """Column 2 * (lane % 4) + 1 of the result: sixteen times one more."""
    found = compute(WRITE + FENCE + PRODUCT + WAIT + STORE)
    assert (found == 16 * (np.arange(128) % 4 * 2 + 2)).all()


def test_sums_that_go_on():
    again = PRODUCT.replace("mov.pred %p2, 0", "mov.pred %p2, -1").replace("mov.b32 %r30, 0x3F803F80", "")
    again = again.replace("mov.b64 %rd5, 0x0000000800080040;\n;", "")
    found = compute(WRITE + FENCE + PRODUCT + again + WAIT + STORE)
    assert (found == 32 * (np.arange(128) % 4 * 2 + 2)).all()


def test_both_operands_in_shared_memory():
    """A is 64 x 16 ones, in blocks of eight rows of 16 bytes behind B; its columns' blocks lie 1024 bytes apart."""
    a = "shl.b32 %r12, %r1, 4;\nadd.s32 %r12, %r12, %r3;\nmov.b32 %r30, 0x3F803F80;\n"
    a += "st.shared.v4.b32 [%r12+256], {%r30, %r30, %r30, %r30};\n"
    product = PRODUCT.replace("{ %r30, %r30, %r30, %r30 }", "%rd6").replace("1, 1, 0;", "1, 1, 0, 0;")
    product = "mov.b64 %rd6, 0x0000000800400050;\n" + product
    found = run(WRITE + a + FENCE + product + WAIT + STORE, blocks=2, threads=128, shared=4096).view(np.float32)
    assert (found == 16 * (np.arange(128) % 4 * 2 + 2)).all()


UNFENCED = PRODUCT[PRODUCT.index("wgmma.mma") :]
SECOND = PRODUCT.replace("%r4", "%r5")
# Sums that are set behind the fence.
START = PRODUCT[: PRODUCT.index("wgmma.mma")].replace("mov.pred %p2, 0", "mov.pred %p2, -1")
START += "".join(f"mov.b32 %r4{place}, NUMBER;\n" for place in range(4))
WAIT_FOR_FIRST = WAIT.replace("0", "1")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("undefined register", WRITE + FENCE + PRODUCT + STORE + WAIT),
        ("register race", WRITE + FENCE + PRODUCT + "mov.b32 %r41, 0;\n" + WAIT + STORE),
        ("register race", WRITE + FENCE + PRODUCT + "mov.b32 %r30, 0;\n" + WAIT + STORE),
        ("register race", WRITE + FENCE + PRODUCT.replace("wgmma.fence.sync.aligned;", "") + WAIT + STORE),
        ("register race", WRITE + FENCE + PRODUCT + WAIT + "add.s32 %r41, %r41, 0;\n" + UNFENCED + WAIT),
        ("register race", WRITE + FENCE + PRODUCT + WAIT + "add.s32 %r30, %r30, 0;\n" + UNFENCED + WAIT),
        ("register race", WRITE + FENCE + START.replace("NUMBER", "0x3F800000") + UNFENCED + WAIT),
        (
            "register race",
            WRITE
            + FENCE
            + START.replace("wgmma.fence.sync.aligned;", "").replace("NUMBER", "0x00000000")
            + UNFENCED
            + WAIT,
        ),
        ("register race", WRITE + FENCE + PRODUCT + WAIT + "mov.b32 %r41, 0;\n" + UNFENCED + WAIT),
        ("shared race", WRITE + "bar.sync 0;\n" + PRODUCT + WAIT + STORE),
        ("shared race", WRITE + "fence.proxy.async.shared::cta;\n" + PRODUCT + WAIT + STORE),
        ("shared race", WRITE + FENCE + PRODUCT + WRITE + WAIT + STORE),
        ("undefined register", WRITE + FENCE + PRODUCT.replace("mov.pred %p2, 0", "mov.pred %p2, -1") + WAIT),
        ("undefined register", WRITE + FENCE + PRODUCT + SECOND + WAIT_FOR_FIRST + "add.s32 %r9, %r51, 1;"),
        ("out of bounds", WRITE + FENCE + PRODUCT.replace("00080040;", "00080100;") + WAIT),
        ("uninitialised", WRITE.replace("%r1, 16;", "%r1, 12;") + FENCE + PRODUCT + WAIT),
    ],
)
def test_faults(kind, body):
    with pytest.raises(Fault) as caught:
        compute(body)
    assert caught.value.kind == kind


def test_the_oldest_groups_arrive_first():
    body = WRITE + FENCE + PRODUCT + SECOND + WAIT_FOR_FIRST + STORE + WAIT
    assert (compute(body) == 16 * (np.arange(128) % 4 * 2 + 2)).all()


def test_sums_that_nobody_touches_need_no_other_fence():
    again = "mov.pred %p2, -1;\n" + UNFENCED
    found = compute(WRITE + FENCE + PRODUCT + again + WAIT + again + WAIT + STORE)
    assert (found == 48 * (np.arange(128) % 4 * 2 + 2)).all()


def test_sums_may_start_from_zero_behind_the_fence():
    found = compute(WRITE + FENCE + START.replace("NUMBER", "0x00000000") + UNFENCED + WAIT + STORE)
    assert (found == 16 * (np.arange(128) % 4 * 2 + 2)).all()


def test_shared_memory_may_be_written_when_the_product_was_waited_for():
    compute(WRITE + FENCE + PRODUCT + WAIT + "bar.sync 0;\n" + WRITE)


@pytest.mark.parametrize(
    ("old", "new"),
    [("m64n8k16", "m64n8k8"), ("f32.bf16", "f16.bf16"), ("1, 1, 0;", "-1, 1, 0;"), ("1, 1, 0;", "1, 1;")],
)
def test_other_forms_are_refused(old, new):
    with pytest.raises(NotModelled, match="wgmma"):
        compute(PRODUCT.replace(old, new))
