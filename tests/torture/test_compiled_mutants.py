"""Errors in compiled kernels: what is planted, how it is drawn, and a short run."""

import itertools
import json
import re

import pytest
from ptx_mutations import GROUPS, mutations


@pytest.fixture
def compiled(scripts):
    import compiled_mutants

    return compiled_mutants


@pytest.mark.parametrize(
    ("code", "kind", "changed"),
    [
        ("bar.sync 0;", "barrier removed", {""}),
        ("cp.async.wait_group 2;", "one group less waited for", {"cp.async.wait_group 3;"}),
        ("@%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };", "guard dropped", {"st.global.b32 [ %rd1 + 0 ], { %r1 };"}),
        ("and.pred %p1, %p2, %p3;", "half of a mask dropped", {"mov.pred %p1, %p2;", "mov.pred %p1, %p3;"}),
        ("selp.b32 %r1, 16, 0, %p1;", "mask dropped", {"mov.b32 %r1, 16;"}),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 16 ], 0x10, %r2;", "address moved",
         {"cp.async.cg.shared.global [%r1+16], [ %rd1 + 16 ], 0x10, %r2;",
          "cp.async.cg.shared.global [ %r1 + 0 ], [%rd1+32], 0x10, %r2;"}),
        ("ld.shared.v2.b16 {%rs1, %rs2}, [%r1+8];", "address moved", {"ld.shared.v2.b16 {%rs1, %rs2}, [%r1+12];"}),
        ("@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", "address moved", {"@%p1 ld.global.b16 { %rs1 }, [%rd1+2];"}),
        ("mad.lo.s64 %rd1, %rd2, %rd3, %rd4;", "stride left out", {"add.s64 %rd1, %rd2, %rd4;"}),
        ("add.s32 %r1, %r2, %r3;", "term left out", {"mov.b32 %r1, %r2;", "mov.b32 %r1, %r3;"}),
        ("and.b32 %r1, %r2, 12;", "bit of an index lost", {"and.b32 %r1, %r2, 8;"}),
        ("or.b64 %rd1, %rd2, 4611686293305294848;", "descriptor moved",
         {"add.s64 %rd1, %rd2, 4611686293305294849;"}),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];", "transposition",
         {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];"}),
        ("prmt.b32 %r1, l, 0x43434343, 0x4140;", "wrong selector",
         {"prmt.b32 %r1, l, 0x43434343, 0x4141;", "prmt.b32 %r1, l, 0x43434343, 0x4041;"}),
        ("selp.b32 %r1, %r2, %r3, %p1;", "sides exchanged", {"selp.b32 %r1, %r3, %r2, %p1;"}),
        ("shfl.sync.bfly.b32 %r1, %r2, 16, 31, -1;", "other lane", {"shfl.sync.bfly.b32 %r1, %r2, 8, 31, -1;"}),
        ("cvt.rn.bf16x2.f32 %r1, %r2, %r3;", "halves exchanged", {"cvt.rn.bf16x2.f32 %r1, %r3, %r2;"}),
        ("mov.b32 {_, %rs1}, %r1;", "halves exchanged", {"mov.b32 {%rs1, _}, %r1;"}),
        ("fma.rn.f32 %r1, %r2, %r3, %r4;", "operands exchanged", {"fma.rn.f32 %r1, %r2, %r4, %r3;"}),
        ("sub.rn.f32.f16 %r1, %rs1, %r2;", "operands exchanged", set()),
        ("mov.b32 offset, 0xC308C308;", "number off", {"mov.b32 offset, 0xC309C309;"}),
        ("mov.b32 %r1, {%rs1, %rs1};", "halves exchanged", set()),
    ],
)  # fmt: skip
def test_changes(code, kind, changed):
    found = mutations(f"\n\t{code}\t// why\n")
    assert {one.apply(f"\n{code}").split("\n")[1] for one in found if one.kind == kind} == changed
    assert {one.group for one in found} <= set(GROUPS) and {one.line for one in found} <= {1}


def test_a_matrix_instruction_has_its_operands_exchanged():
    sums = "{ %r1, %r2, %r3, %r4 }"
    code = f"mma.sync.aligned.m16n8k16 {sums}, {{ %r5, %r6, %r7, %r8 }}, {{ %r9, %r10 }}, {sums};"
    changed = {one.kind: one.changes[0][1] for one in mutations(code)}
    assert "{%r5, %r7, %r6, %r8}, { %r9, %r10 }" in changed["matrices exchanged"]
    assert "{ %r5, %r6, %r7, %r8 }, { %r10, %r9 }" in changed["operands exchanged"]


def test_the_bound_of_one_expression_is_changed_as_a_whole():
    lines = [".loc 1 5 3", "setp.lt.s32 %p1, %r1, %r9;", "setp.lt.s32 %p2, %r2, %r9;", ".loc 1 6 3"]
    lines += ["setp.lt.s32 %p3, %r3, %r9;", "setp.lt.s32 %p4, %r3, 7;"]
    first, second = mutations("\n".join(lines))
    assert [line for line, _ in first.changes] == [1, 2] and [line for line, _ in second.changes] == [4]
    assert first.changes[0][1] == "setp.le.s32 %p1, %r1, %r9;"


def test_a_group_of_copies_that_the_next_one_takes_in_is_no_error():
    commit = "cp.async.commit_group;"
    lines = [commit, "mov.b32 %r1, %r2;", commit, "cp.async.wait_group 1;", commit, "$L__BB0_2:", commit]
    assert [one.line for one in mutations("\n".join(lines)) if one.kind == "group not ended"] == [2, 4, 6]


def test_errors_are_drawn_in_equal_shares(compiled):
    every = [kernel for kernel in compiled.kernels() if "split_sums" in str(kernel) or "embedding" in str(kernel)]
    assert len(every) == 2
    chosen = compiled.drawn(every, 20, 0)
    assert len(set(chosen_keys(chosen))) == 20
    groups = [mutation.group for _, mutation in chosen]
    assert max(map(groups.count, GROUPS)) <= 10 and groups.count("guards") >= 5
    assert {kernel.name for kernel, _ in chosen} == {"_embedding_kernel", "_sum_parts_kernel"}
    assert chosen_keys(compiled.drawn(every, 20, 0)) == chosen_keys(chosen) != chosen_keys(compiled.drawn(every, 20, 1))
    whole = compiled.drawn(every, 10_000, 0)
    assert len(whole) == sum(len(kernel.mutations) for kernel in every)


def chosen_keys(chosen):
    return [(kernel.name, mutation) for kernel, mutation in chosen]


def test_a_lower_bit_of_a_scale_shows_in_a_product_with_unit_vectors(compiled):
    kernel = next(compiled.kernels())
    lost = next(one for one in kernel.mutations if re.match(r"fma\.rn\.bf16x2 p, \S+, none, ", one.changes[0][1]))
    assert kernel.outcome(lost) == compiled.WRONG


def test_entries_name_what_an_error_is_described_by(compiled):
    from compiled_explanations import EXPLANATIONS, explanation

    kernel = next(kernel for kernel in compiled.kernels() if "split_sums" in str(kernel))
    error = compiled.described(kernel, kernel.mutations[0])
    assert error["code"] and error["instruction"] and explanation(error) is None
    for patterns, reason in EXPLANATIONS:
        assert patterns.keys() <= error.keys() and "kind" in patterns and reason.endswith(".")


NAMES = ("_rms_norm_kernel", "_rope_kernel", "_gated_activation_backward_kernel", "_lora_gradients_kernel")
NAMES += ("_expert_matmul_dx_kernel",)


@pytest.mark.parametrize("name", NAMES)
def test_errors_in_small_kernels_and_in_those_over_experts_are_noticed(compiled, name):
    """One of each group; the script tries hundreds."""
    from compiled_explanations import explanation
    from compiled_kernels import expert_kernels, small_kernels

    every = itertools.chain(small_kernels(), expert_kernels())
    kernel = next(kernel for kernel in every if kernel.name == name)
    firsts = {mutation.group: mutation for _, mutation in compiled.drawn([kernel], 30, 0)}
    assert len(firsts) >= 3
    for one in firsts.values():
        outcome = kernel.outcome(one)
        assert outcome != compiled.MISSED or explanation(compiled.described(kernel, one)), one


@pytest.mark.parametrize("explained", [True, False])
def test_a_short_run(compiled, monkeypatch, tmp_path, explained):
    monkeypatch.setattr(compiled, "explanation", lambda error: "why not" if explained else None)
    """All barriers of a kernel, one of which is not needed."""
    output, (kernel,) = tmp_path / "result.json", [one for one in compiled.kernels() if "softmax_tile fp32" in str(one)]
    kernel.__dict__["mutations"] = [one for one in kernel.mutations if one.kind == "barrier removed"]
    monkeypatch.setattr(compiled, "kernels", lambda: [kernel])
    code = compiled.main(["--output", str(output)])
    found = json.loads(output.read_text())
    assert found["tried"] == found["noticed"] + found["missed"] and found["missed"] == len(found["misses"]) > 0
    assert found["noticed"] > 4 and sum(found["noticed_by"].values()) == found["noticed"]
    assert (code, found["lost"]) == ((0, 0) if explained else (1, found["missed"]))
