"""Loads, stores, asynchronous copies and barriers in small kernels, and every fault that they can have."""

import numpy as np
import pytest
from ptx_kernels import run

from mebp_triton.autotune.emulator.faults import Fault, NotModelled

# Each thread writes a word, and reads its neighbour's behind what stands in the braces.
EXCHANGE = """
xor.b32 %r5, %r2, 4;
add.s32 %r6, %r3, %r5;
st.shared.b32 [%r4], %r1;
{}
ld.shared.b32 %r7, [%r6];
st.global.b32 [%rd3], %r7;
"""
THREAD = np.arange(64)
GIVEN = np.arange(3 * 64, dtype=np.uint32).reshape(3, 64) + 1000


@pytest.mark.parametrize("between", ["bar.sync 0;", "bar.warp.sync -1;"])
def test_an_exchange_in_shared_memory(between):
    assert (run(EXCHANGE.format(between))[0] == THREAD ^ 1).all()


def test_an_exchange_between_warps_needs_the_barrier_of_the_block():
    body = EXCHANGE.replace("%r2, 4", "%r2, 128")
    with pytest.raises(Fault, match="shared race"):
        run(body.format("bar.warp.sync -1;"))
    assert (run(body.format("bar.sync 0;"))[0] == THREAD ^ 32).all()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("uninitialised", "ld.shared.b32 %r7, [%r4];"),
        ("out of bounds", "ld.shared.b32 %r7, [%r4+1000];"),
        ("misaligned", "ld.shared.v2.b32 {%r7, %r8}, [%r4];"),
        ("shared race", EXCHANGE.format("")),
        ("shared race", "st.shared.b32 [%r3], %r1;"),
        ("out of bounds", "ld.global.b32 %r7, [%rd3+768];"),
        ("out of bounds", "st.global.b32 [%rd3+-4], %r1;"),
        ("misaligned", "setp.lt.s32 %p1, %r1, 60;\n @%p1 ld.global.v4.b32 {%r7, %r8, %r9, %r10}, [%rd3];"),
        ("global race", "st.global.b32 [%rd1], %r1;"),
        ("global race", "st.global.b32 [%rd3], %r1;\nld.global.b32 %r7, [%rd1];"),
        ("undefined register", "st.global.b32 [%rd3], %r50;"),
        ("divergence", "setp.lt.s32 %p1, %r1, 7;\n @%p1 bra $L1;\n bar.sync 0;\n$L1:"),
        (
            "shared race",
            "cp.async.ca.shared.global [%r4], [%rd3], 4;\ncp.async.commit_group;\nld.shared.b32 %r7, [%r4];",
        ),
        ("shared race", "cp.async.ca.shared.global [%r4], [%rd3], 4;\ncp.async.commit_group;"),
    ],
)
def test_faults(kind, body):
    with pytest.raises(Fault, match=r"at line \d+ \(\?\)") as caught:
        run(body)
    assert caught.value.kind == kind


def test_vectors_and_narrow_words():
    body = "shl.b32 %r9, %r1, 3;\nadd.s32 %r9, %r9, %r3;\nst.shared.v2.b32 [%r9], {%r1, %r20};\n"
    body += "ld.shared.v2.b16 {%rs1, %rs2}, [%r9];\nld.shared.s8 %r8, [%r9+4];\ncvt.u32.u16 %r7, %rs1;\n"
    body += "mad.lo.s32 %r7, %r8, 100, %r7;\nst.global.b32 [%rd3], %r7;\n"
    assert (run(body) == THREAD + 100 * np.arange(3)[:, None]).all()


def test_a_signed_byte_keeps_its_sign():
    body = "mov.b32 %r9, 0x80;\nst.shared.b32 [%r4], %r9;\nld.shared.s8 %r8, [%r4];\nst.global.b32 [%rd3], %r8;\n"
    assert (run(body) == 0xFFFFFF80).all()


COPY = "cp.async.ca.shared.global [%r4], [%rd3], 4{};\ncp.async.commit_group;\ncp.async.wait_group 0;\n"


def test_a_copy_is_ones_own_after_waiting():
    own = COPY.format("") + "ld.shared.b32 %r7, [{}];\nadd.s32 %r7, %r7, 1;\nst.global.b32 [%rd3], %r7;\n"
    assert (run(own.format("%r4"), given=GIVEN) == GIVEN + 1).all()
    other = "xor.b32 %r5, %r2, 4;\n add.s32 %r6, %r3, %r5;\n" + own.format("%r6")
    with pytest.raises(Fault, match="shared race"):
        run(other, given=GIVEN)
    # To store what a copy of another thread may still read is no race here: the copy has arrived.
    assert (run(other.replace("wait_group 0;", "wait_group 0;\nbar.sync 0;"), given=GIVEN) == (GIVEN ^ 1) + 1).all()


@pytest.mark.parametrize("body", ["st.shared.b32 [%r3], {};", COPY.format("").replace("[%r4], [%rd3]", "[%r3], [{}]")])
def test_what_all_threads_put_into_one_place_must_be_the_same(body):
    same, different = ("%r20", "%r1") if body.startswith("st") else ("%rd1", "%rd3")
    run(body.format(same), given=GIVEN)
    with pytest.raises(Fault, match=r"shared race.*different values to one word"):
        run(body.format(different), given=GIVEN)


def test_a_copy_of_no_bytes_writes_zeros_and_reads_nothing():
    """Its address lies nowhere."""
    body = "setp.lt.s32 %p1, %r1, 10;\nselp.b32 %r8, 4, 0, %p1;\nselp.b64 %rd3, %rd3, 64, %p1;\n" + COPY.format(", %r8")
    body += "ld.shared.b32 %r7, [%r4];\nadd.s64 %rd5, %rd1, %rd2;\nst.global.b32 [%rd5], %r7;\n"
    assert (run(body, given=GIVEN) == np.where(THREAD < 10, GIVEN, 0)).all()


def test_older_groups_arrive_first():
    body = "cp.async.ca.shared.global [%r4], [%rd3], 4;\ncp.async.commit_group;\n"
    body += "cp.async.ca.shared.global [%r4+256], [%rd3], 4;\ncp.async.commit_group;\ncp.async.wait_group 1;\n"
    body += "ld.shared.b32 %r7, [%r4{}];\ncp.async.wait_group 0;\n"
    run(body.format(""))
    with pytest.raises(Fault, match="shared race"):
        run(body.format("+256"))


@pytest.mark.parametrize(
    "body",
    [
        "ld.volatile.global.b32 %r7, [%rd3];",
        "ld.global.L2::cache_hint.b32 %r7, [%rd3], %rd4;",
        "ld.local.b32 %r7, [%rd3];",
        "ld.global.v2.b32 %r7, [%rd3];",
        "st.b32 [%rd3], %r1;",
        "st.shared::cluster.b32 [%r4], %r1;",
        "st.global.b8 [%rd3], %r1;",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd3], 4, [%r5];",
        "mov.b32 %r8, 2;\ncp.async.ca.shared.global [%r4], [%rd3], 4, %r8;",
        "bar.arrive 0, 64;",
        "bar.sync 0, 32;",
        "membar.gl;",
        "fence.acq_rel.gpu;",
        "red.global.add.f32 [%rd3], %r1;",
        "mbarrier.init.shared::cta.b64 [%r4], 1;",
    ],
)
def test_what_is_not_modelled_names_the_instruction(body):
    with pytest.raises(NotModelled, match=r"line \d+ \(\?\): [a-z]"):
        run(body)
