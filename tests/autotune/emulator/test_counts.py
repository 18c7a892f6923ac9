"""What is counted: instructions, sectors of global memory, wavefronts of shared memory."""

import pytest
from ptx_kernels import run

from mebp_triton.autotune.emulator.counts import Counts, class_of


def counted(body, **kwargs):
    counts: list[Counts] = []
    run(body, counts=counts, **kwargs)
    return counts[0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "matrix"),
        ("wgmma.wait_group.sync.aligned", "asynchronous control"),
        ("cp.async.cg.shared.global", "cp.async"),
        ("add.rn.f32x2", "float"),
        ("add.s32", "integer"),
        ("prmt.b32", "bits"),
        ("or.pred", "predicate"),
        ("cvt.rn.bf16x2.f32", "convert"),
    ],
)
def test_classes(name, kind):
    assert class_of(name) == kind


def test_instructions_are_counted_once_for_each_block_that_is_there():
    counts = counted("setp.eq.s32 %p1, %r20, 1;\n@%p1 bra $L1;\nadd.s32 %r9, %r1, %r1;\n$L1:\n")
    names = [one.name for one in counts.kernel.code]
    assert counts.executed[names.index("bra")] == 3
    # The one block that went to the label did not add.
    assert counts.executed[names.index("bra") + 1] == 2
    assert counts.per_warp()["branch"] == 2 and counts.blocks == 3


@pytest.mark.parametrize(("step", "parts", "unique"), [(4, 4, 128), (32, 32, 128), (0, 1, 4)])
def test_sectors(step, parts, unique):
    """Neighbouring words fill sectors; words 32 bytes apart take one each; one word is read once."""
    body = (
        f"mul.lo.s32 %r9, %r1, {step};\ncvt.u64.u32 %rd5, %r9;\nadd.s64 %rd5, %rd5, %rd1;\nld.global.b32 %r8, [%rd5];\n"
    )
    counts = counted(body, threads=32, blocks=8)
    (access,) = counts.to_global.values()
    assert (access.requests, access.bytes) == (8, 8 * 128)
    assert (access.parts, access.unique) == (8 * parts, 8 * unique)
    assert access.least == 8 * (4 if unique == 128 else 1)


@pytest.mark.parametrize(("step", "parts"), [(4, 1), (8, 2), (128, 32), (0, 1)])
def test_bank_conflicts(step, parts):
    """Words in one bank come one after another, unless they are the same word."""
    body = f"mul.lo.s32 %r9, %r1, {step};\nadd.s32 %r9, %r9, %r3;\nmov.b32 %r8, 7;\nst.shared.b32 [%r9], %r8;\n"
    counts = counted(body, threads=32, blocks=2, shared=4096)
    (access,) = counts.to_shared.values()
    assert (access.requests, access.parts, access.least) == (2, 2 * parts, 2)


def test_wide_accesses_take_phases():
    body = "shl.b32 %r9, %r1, 4;\nadd.s32 %r9, %r9, %r3;\nst.shared.v4.b32 [%r9], {%r1, %r1, %r1, %r1};\n"
    (access,) = counted(body, threads=32, blocks=1).to_shared.values()
    assert (access.parts, access.least, access.bytes) == (4, 4, 512)


def test_counts_of_parts_of_a_launch_add_up():
    body = "st.shared.b32 [%r4], %r1;\nst.global.b32 [%rd3], %r1;\n"
    first, second = (counted(body, blocks=blocks) for blocks in (2, 3))
    whole = counted(body, blocks=5)
    first.add(second)
    assert (first.blocks, first.executed.tolist()) == (5, whole.executed.tolist())
    assert [access.parts for access in first.to_global.values()] == [one.parts for one in whole.to_global.values()]
    (source,) = first.by_source(first.to_shared).values()
    assert source.requests == 10 and first.by_source(first.to_shared).keys() == {("?", "st.shared.b32")}
