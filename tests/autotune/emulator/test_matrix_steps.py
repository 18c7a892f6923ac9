"""Products of warps and exchanges of matrices, in small kernels."""

import numpy as np
import pytest
from ptx_kernels import run

from mebp_triton.autotune.emulator.faults import Fault, NotModelled

# Each row of 16 bytes is four words; thread t writes words 4t to 4t + 3, then thread t gives the address of row t.
ROWS = """
shl.b32 %r9, %r1, 4;
add.s32 %r9, %r9, %r3;
mad.lo.s32 %r10, %r1, 0x00080008, 0x00010000;
add.s32 %r11, %r10, 0x00020002;
add.s32 %r12, %r10, 0x00040004;
add.s32 %r13, %r10, 0x00060006;
st.shared.v4.b32 [%r9], {%r10, %r11, %r12, %r13};
"""
LOAD = "ldmatrix.sync.aligned.m8n8.x{}{}.shared.b16 {{{}}}, [%r9];\nst.global.b32 [%rd3], {};\n"


def elements(found):
    return found.view(np.uint16).reshape(32, 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_handed_out(transposed):
    """Row r holds 8r to 8r + 7. Of matrix 1, rows 8 to 15, lane l gets two elements."""
    body = ROWS + "bar.sync 0;\n" + LOAD.format(2, ".trans" if transposed else "", "%r14, %r15", "%r15")
    found = elements(run(body, blocks=1, threads=32))
    for lane in range(32):
        for half in range(2):
            row, column = 8 + lane // 4, lane % 4 * 2 + half
            if transposed:
                row, column = 8 + column, row - 8
            assert found[lane, half] == 8 * row + column


def test_rows_that_other_threads_wrote_need_a_barrier():
    """Each thread gives the address of its neighbour's row."""
    load = "xor.b32 %r9, %r9, 16;\n" + LOAD.format(1, "", "%r14", "%r14")
    with pytest.raises(Fault, match="shared race"):
        run(ROWS + load, blocks=1, threads=32)
    run(ROWS + "bar.warp.sync -1;\n" + load, blocks=1, threads=32)


def test_what_is_stored_is_loaded():
    body = "shl.b32 %r9, %r1, 4;\nadd.s32 %r9, %r9, %r3;\nadd.s32 %r8, %r1, 100;\n"
    body += "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r9], {%r1, %r8};\nbar.sync 0;\n"
    found = run(body + LOAD.format(2, "", "%r14, %r15", "%r15"), blocks=1, threads=32)
    assert (found == np.arange(32) + 100).all()


PRODUCT = """
mov.b32 %r30, 0x3F803F80;
mov.b32 %r31, 0x40004000;
cvt.rn.f32.s32 %r40, %r1;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r41, %r42, %r43, %r44 }, { %r30, %r30, %r30, %r30 },
    { %r31, %r31 }, { %r40, %r40, %r40, %r40 };
st.global.b32 [%rd3], %r43;
"""


def test_a_product_of_a_warp():
    """Sixteen times 1 times 2, on top of what was there."""
    assert (run(PRODUCT).view(np.float32) == 32 + np.arange(64)).all()


def test_operands_of_half_precision():
    body = PRODUCT.replace("bf16", "f16").replace("0x3F803F80", "0x3C003C00")
    assert (run(body).view(np.float32) == 32 + np.arange(64)).all()


def test_operands_that_change_are_read_again():
    body = PRODUCT + "mov.b32 %r31, 0x3F803F80;\n" + PRODUCT.replace("mov.b32 %r31, 0x40004000;", "")
    assert (run(body).view(np.float32) == 16 + np.arange(64)).all()


def test_a_product_that_not_all_threads_reach():
    with pytest.raises(Fault, match="divergence"):
        run("setp.lt.s32 %p1, %r1, 7;\n@%p1 bra $L1;\n" + PRODUCT + "$L1:\n")


@pytest.mark.parametrize(
    "body",
    [
        PRODUCT.replace("m16n8k16", "m16n8k8"),
        PRODUCT.replace("f32.bf16.bf16.f32", "f16.f16.f16.f16"),
        PRODUCT.replace("f32.bf16.bf16.f32", "f32.tf32.tf32.f32"),
        PRODUCT.replace("mma.sync.aligned", "mma.sp.sync.aligned"),
        PRODUCT.replace("{ %r31, %r31 }", "{ %r31 }"),
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r14, %r15}, [%r9];",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r14}, [%r9];",
        "stmatrix.sync.aligned.m8n8.x3.shared.b16 [%r9], {%r14, %r15, %r16};",
        "tcgen05.mma.cta_group::1.kind::f16 [%r9], %rd4, %rd5, %r6, 1;",
    ],
)
def test_other_matrix_instructions_are_refused(body):
    with pytest.raises(NotModelled, match=r"line \d+ .*(mma|matrix)"):
        run(body)
