"""Few configurations are chosen for a whole table, and each is sound for every kind of weight."""

from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune import rank, shipping
from mebp_triton.autotune.compile import SHARED_LIMITS, StaticReport
from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.execute import TripCounts
from mebp_triton.autotune.sass import LoopCounts
from mebp_triton.autotune.shipping import MOST_CONFIGS, TOLERANCE, objection, static_table, variants
from mebp_triton.kernels.configs import PANEL, Problem, TileConfig
from mebp_triton.kernels.names import SCHEMES, Form
from mebp_triton.kernels.tables import parse_table, table_to_json

PROBLEM = Problem("matmul", 64, 4096, 4096)
SPACE = [
    TileConfig(64, 64, 64, num_warps=4, num_stages=2),
    TileConfig(64, 64, 64, num_warps=4, num_stages=2, split=2),
    TileConfig(64, 128, 64, num_warps=8, num_stages=2),
]


def made(spill_bytes=0):
    loop = LoopCounts(250, 4, 120, 40, 0, "HMMA")
    return StaticReport("_matmul_kernel", 87, 100, spill_bytes, 1024, SHARED_LIMITS[87], loop=loop)


@pytest.fixture
def seen(monkeypatch):
    """The variants that are compiled and executed, which do as they are told: nothing is compiled."""

    class Told:
        compiled, executed = [], []
        spills = fault = lambda problem, config: None

    def compiled(problem, config, target_sm, rank=16, bias=False, scale_dtype=torch.float16):
        Told.compiled.append((problem.form, problem.dtype, rank, scale_dtype))
        return made(Told.spills(problem, config) or 0)

    def executed(problem, config, target_sm, rank, bias, scale_dtype, ragged):
        Told.executed.append((problem.form, problem.dtype, rank, scale_dtype, ragged, config.scale_sums))
        fault = Told.fault(problem, config)
        if isinstance(fault, Exception):
            raise fault
        return fault

    Told.compiled, Told.executed = [], []
    for module in (rank, shipping):
        monkeypatch.setattr(module, "compiled", compiled)
    monkeypatch.setattr(shipping, "executed", executed)
    return Told


def table_problems():
    return [
        Problem(kernel, m, n, 2048, scheme, 64, dtype)
        for kernel in ("matmul", "matmul_dx")
        for m in (16, 64, 4096)
        for n in (512, 2048)
        for scheme in ("symmetric", "codebook")
        for dtype in (torch.bfloat16, torch.float16)
    ]


def test_static_table(seen, monkeypatch):
    monkeypatch.setattr(shipping, "candidates", lambda problem, target_sm: SPACE)
    monkeypatch.setattr(rank, "counted", lambda *arguments: TripCounts(300, 300, 0, 300, 300))
    problems, said = table_problems(), []
    entries = static_table(problems, 87, said.append)
    assert sorted(map(str, (entry.problem for entry in entries))) == sorted(map(str, problems))
    assert {(entry.provenance, entry.device) for entry in entries} == {("static", None)}
    assert {entry.versions.keys() == {"triton", "torch"} for entry in entries} == {True}
    assert parse_table(table_to_json("sm_87", entries), "sm_87").keys() == set(problems)
    few = [entry for entry in entries if entry.problem.m == 16]
    assert all(entry.route != PANEL for entry in few)
    assert said[0] == f"1 of 2 candidates, matmul {SPACE[0]}"
    chosen = {entry.route for entry in entries} - {PANEL}
    assert chosen <= {config for config in SPACE if f"chosen, matmul {config}: sound" in said}


def settle(times, monkeypatch, fault=lambda config: None):
    monkeypatch.setattr(shipping, "objection", lambda problem, config, target_sm, say: fault(config))
    return [route for route, _ in shipping._settle([PROBLEM] * len(times), times, 87)]


def test_a_shared_configuration_within_tolerance_is_preferred(monkeypatch):
    one, two, three = SPACE
    near = 10 * (1 + TOLERANCE / 2)
    times = [{PANEL: 100, one: 10, two: near}, {PANEL: 100, three: 10, two: near}, {PANEL: 5, one: 10}]
    assert settle(times, monkeypatch) == [two, two, PANEL]
    times[1] = {PANEL: 100, three: 10, two: 13}
    assert settle(times, monkeypatch) in ([one, three, PANEL], [two, three, PANEL])


def test_what_is_not_clean_is_never_chosen(monkeypatch):
    one, two, three = SPACE
    times = [{PANEL: 100, one: 10, two: 40}]
    assert settle(times, monkeypatch, lambda config: None if config != one else "spills") == [two]
    assert settle(times, monkeypatch, lambda config: "spills") == [PANEL]


def test_few_configurations(monkeypatch):
    configs = [replace(SPACE[0], num_stages=stages) for stages in range(1, 3 * MOST_CONFIGS)]
    times = [{PANEL: 100.0 + i, config: 10.0} for i, config in enumerate(configs)]
    routes = settle(times, monkeypatch)
    assert len(set(routes) - {PANEL}) == MOST_CONFIGS


def test_variants_are_all_that_a_table_may_serve():
    found = variants(PROBLEM, 87)
    kinds = {(one.problem.form, one.problem.dtype, one.scale_dtype) for one in found if one.rank == 64 and one.bias}
    assert len(kinds) == 25 and {form.bits for form, *_ in kinds} == {4, 8}
    two_levels = [form for form, _, scale_dtype in kinds if scale_dtype == torch.int8]
    assert {form.scheme for form in two_levels} == set(SCHEMES) and {form.bits for form in two_levels} == {4, 8}
    assert {one.rank for one in found} == {16, 64}
    assert {one.problem.dtype for one in variants(PROBLEM, 75)} == {torch.float16}
    assert not any(one.bias for one in variants(replace(PROBLEM, kernel="matmul_dx"), 87))


def is_one(problem, config):
    return (problem.form, problem.dtype, config) == (Form("affine", 32), torch.float16, SPACE[0])


def test_sound_means_every_variant(seen):
    said = []
    assert objection(PROBLEM, SPACE[2], 87, said.append) is None and said == []
    assert len({entry for entry in seen.compiled if entry[2] == 64}) == 25
    # Each is executed as it was compiled, and one of each scheme for three weights as well.
    assert [entry[:4] for entry in seen.executed if not entry[4]] == seen.compiled[1:]
    assert {entry[:2] for entry in seen.executed if entry[4]} == {
        (Form("symmetric", 128), torch.bfloat16),
        (Form("affine", 32), torch.bfloat16),
        (Form("codebook", 32), torch.bfloat16),
    }
    seen.executed.clear()
    sums = TileConfig(16, 64, 64, scale_sums=True)
    assert objection(PROBLEM, sums, 87) is None
    forms = {summed: {entry[0] for entry in seen.executed if entry[5] == summed} for summed in (True, False)}
    assert {(form.scheme, form.bits) for form in forms[True]} == {("symmetric", 4), ("symmetric", 8)}
    # What it does not suit is executed as it is launched, with scaled weights.
    assert {form.scheme for form in forms[False]} == set(SCHEMES)
    assert any(entry[4] and entry[5] for entry in seen.executed)


def test_one_variant_that_spills_or_is_wrong_is_enough(seen):
    seen.spills = lambda problem, config: 8 if is_one(problem, config) else 0
    assert objection(PROBLEM, SPACE[0], 87) == "4 bits, affine, groups of 32, float16: spills 8 bytes a thread"
    seen.spills = lambda problem, config: 0
    seen.fault = lambda problem, config: "shared race: ..." if is_one(problem, config) else None
    assert objection(PROBLEM, SPACE[0], 87) == "4 bits, affine, groups of 32, float16: shared race: ..."
    assert objection(PROBLEM, SPACE[1], 87) is None


def test_what_is_not_executed_is_said(seen):
    seen.fault = lambda problem, config: NotModelled("line 7: tcgen05.alloc: not modelled")
    said = []
    assert objection(PROBLEM, SPACE[0], 87, said.append) is None
    assert said == [f"not executed, 31 times, matmul {SPACE[0]}: line 7: tcgen05.alloc: not modelled"]
