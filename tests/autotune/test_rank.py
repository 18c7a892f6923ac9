"""Candidates are compiled, dropped for a reason or ranked, and few of them are chosen for a whole table."""

from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune import rank as ranking
from mebp_triton.autotune.compile import SHARED_LIMITS, StaticReport
from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.execute import TripCounts
from mebp_triton.autotune.rank import MOST_CONFIGS, TOLERANCE, compiled, rank, static_table, unfit, variants
from mebp_triton.autotune.sass import LoopCounts
from mebp_triton.kernels.configs import Problem, TileConfig
from mebp_triton.kernels.tables import parse_table, table_to_json

PROBLEM = Problem("matmul", 64, 4096, 4096)
SPACE = [
    TileConfig(64, 64, 64, num_warps=4, num_stages=2),
    TileConfig(64, 64, 64, num_warps=4, num_stages=2, split=2),
    TileConfig(64, 128, 64, num_warps=8, num_stages=2),
]
WASTEFUL = TileConfig(64, 256, 64, num_warps=2, num_stages=2)


def made(target_sm=90, tensor="HGMMA", conversions=0, **changes):
    loop = LoopCounts(250, 4, 120, 40, conversions, tensor)
    good = StaticReport("_matmul_kernel", target_sm, 100, 0, 1024, SHARED_LIMITS[target_sm])
    return replace(good, **{"loop": loop, "conversions": conversions, **changes})


@pytest.fixture
def small_space(monkeypatch):
    monkeypatch.setattr(ranking, "candidates", lambda problem, target_sm: [*SPACE, WASTEFUL])


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (made(), None),
        (made(spill_bytes=8), "spills 8 bytes a thread"),
        (made(shared_bytes=1 << 20), "takes 1048576 bytes of shared memory, limit 232448"),
        (made(100, "UTCHMMA", tensor_memory=1024), "takes 1024 columns of tensor memory, limit 512"),
        (made(loop=None), "has no main loop"),
        (made(87, "HMMA", 64), "converts integers in the main loop, 64 times a trip"),
        (made(75, "FFMA", 64), None),
        (made(90, "HMMA"), "uses HMMA where sm_90 has HGMMA"),
        (made(120, "HMMA"), None),
    ],
)
def test_reasons(report, reason):
    found = unfit(PROBLEM, report)
    assert found is None if reason is None else found is not None and reason in found


def test_hgmma_is_asked_of_many_tokens_in_16_bits_only():
    assert unfit(replace(PROBLEM, m=32), made(90, "HMMA")) is None
    assert unfit(replace(PROBLEM, dtype=torch.float32), made(90, "FFMA")) is None


def test_rank(small_space):
    done = []
    found = rank(PROBLEM, 87, progress=lambda *state: done.append(state))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {candidate.route for candidate in found.kept} == {None, *SPACE}
    times = [candidate.prediction.time_us for candidate in found.kept]
    assert times == sorted(times) and times[0] > 0
    for candidate in found.kept:
        assert (candidate.report is None) == (candidate.route is None)
        assert candidate.report is None or unfit(PROBLEM, candidate.report) is None
    (dropped,) = found.dropped
    assert dropped.config == WASTEFUL and dropped.report is not None and "spills" in dropped.reason
    limited = rank(PROBLEM, 87, limit=1)
    assert len(limited.kept) == 2 and None in [candidate.route for candidate in limited.kept]
    tiles = [candidate for candidate in found.kept if candidate.route]
    assert tiles[0] in limited.kept


def test_shared_memory_is_counted(small_space):
    found = rank(PROBLEM, 87)
    for candidate in found.kept:
        assert candidate.not_executed is None
        assert (candidate.prediction.clocks.get("shared memory", 0) > 0) == (candidate.route is not None)


def test_what_cannot_be_executed_stays_and_says_so(small_space, monkeypatch):
    """If one of them is not counted, all are ranked without counts: none looks better for that."""
    known = ranking.trip_counts

    def counts(problem, config, target_sm):
        if config == SPACE[2]:
            raise NotModelled("line 7: tcgen05.alloc: this instruction is not modelled")
        return known(problem, config, target_sm)

    monkeypatch.setattr(ranking, "trip_counts", counts)
    ranking._counted.cache_clear()
    found = rank(PROBLEM, 87)
    ranking._counted.cache_clear()
    tiles = {candidate.route: candidate for candidate in found.kept if candidate.route}
    assert tiles.keys() == set(SPACE)
    assert tiles[SPACE[2]].not_executed == "not executed: line 7: tcgen05.alloc: this instruction is not modelled"
    assert tiles[SPACE[0]].not_executed is None
    assert {candidate.prediction.clocks["shared memory"] for candidate in tiles.values()} == {0.0}


def test_problems_of_the_same_code_share_a_report(monkeypatch):
    calls = []
    monkeypatch.setattr(ranking, "report", lambda *arguments: calls.append(arguments) or made())
    ranking._compiled.cache_clear()
    for n, k in ((4096, 4096), (1024, 64 * 14), (6912, 1152)):
        compiled(replace(PROBLEM, n=n, k=k), SPACE[0], 90)
    assert len(calls) == 1
    compiled(replace(PROBLEM, k=4000), SPACE[0], 90)
    compiled(replace(PROBLEM, k=4001), SPACE[0], 90)
    assert [arguments[0].k for arguments in calls] == [4096, 4112, 4097]
    ranking._compiled.cache_clear()


def test_what_does_not_compile_is_dropped(small_space, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("line 1\n  the compiler's objection")

    monkeypatch.setattr(ranking, "report", fail)
    ranking._compiled.cache_clear()
    found = rank(PROBLEM, 87)
    ranking._compiled.cache_clear()
    assert [candidate.route for candidate in found.kept] == [None]
    assert {dropped.reason for dropped in found.dropped} == {"does not compile: the compiler's objection"}
    assert all(dropped.report is None for dropped in found.dropped)


def table_problems():
    return [
        Problem(kernel, m, n, 2048, scheme, 64, dtype)
        for kernel in ("matmul", "matmul_dx")
        for m in (16, 64, 4096)
        for n in (512, 2048)
        for scheme in ("symmetric", "codebook")
        for dtype in (torch.bfloat16, torch.float16)
    ]


def test_static_table(small_space, monkeypatch):
    monkeypatch.setattr(ranking, "report", lambda *arguments: made(87, "HMMA"))
    monkeypatch.setattr(ranking, "trip_counts", lambda *arguments: TripCounts(300, 300, 300, 300))
    ranking._compiled.cache_clear()
    ranking._counted.cache_clear()
    problems = table_problems()
    entries = static_table(problems, 87)
    ranking._compiled.cache_clear()
    ranking._counted.cache_clear()
    assert sorted(map(str, (entry.problem for entry in entries))) == sorted(map(str, problems))
    assert {(entry.provenance, entry.device) for entry in entries} == {("static", None)}
    assert {entry.versions.keys() == {"triton", "torch"} for entry in entries} == {True}
    assert parse_table(table_to_json("sm_87", entries), "sm_87").keys() == set(problems)
    few = [entry for entry in entries if entry.problem.m == 16]
    assert all(entry.route is not None for entry in few)


def settle(times, monkeypatch, clean=lambda problem, config, target_sm: True):
    monkeypatch.setattr(ranking, "is_clean", clean)
    return [route for route, _ in ranking._settle([PROBLEM] * len(times), times, 87)]


def test_a_shared_configuration_within_tolerance_is_preferred(monkeypatch):
    one, two, three = SPACE
    near = 10 * (1 + TOLERANCE / 2)
    times = [{None: 100, one: 10, two: near}, {None: 100, three: 10, two: near}, {None: 5, one: 10}]
    assert settle(times, monkeypatch) == [two, two, None]
    times[1] = {None: 100, three: 10, two: 13}
    assert settle(times, monkeypatch) in ([one, three, None], [two, three, None])


def test_what_is_not_clean_is_never_chosen(monkeypatch):
    one, two, three = SPACE
    times = [{None: 100, one: 10, two: 40}]
    assert settle(times, monkeypatch, lambda problem, config, target_sm: config != one) == [two]
    assert settle(times, monkeypatch, lambda problem, config, target_sm: False) == [None]


def test_few_configurations(monkeypatch):
    configs = [replace(SPACE[0], num_stages=stages) for stages in range(1, 3 * MOST_CONFIGS)]
    times = [{None: 100.0 + i, config: 10.0} for i, config in enumerate(configs)]
    routes = settle(times, monkeypatch)
    assert len(set(routes) - {None}) == MOST_CONFIGS


def test_variants_are_all_that_a_table_may_serve():
    found = variants(PROBLEM, 87)
    kinds = {
        (problem.scheme, problem.group_size, problem.dtype) for problem, rank, bias in found if rank == 64 and bias
    }
    assert len(kinds) == 18
    assert {rank for _, rank, _ in found} == {16, 64}
    assert {problem.dtype for problem, _, _ in variants(PROBLEM, 75)} == {torch.float16}
    assert not any(bias for _, _, bias in variants(replace(PROBLEM, kernel="matmul_dx"), 87))


def test_clean_means_every_variant(monkeypatch):
    seen = []

    def report(problem, config, target_sm, rank, bias):
        seen.append((problem.scheme, problem.group_size, problem.dtype, rank))
        bad = problem.scheme == "affine" and problem.group_size == 32 and problem.dtype == torch.float16
        return made(87, "HMMA", spill_bytes=8 if bad and config == SPACE[0] else 0)

    monkeypatch.setattr(ranking, "report", report)
    ranking._compiled.cache_clear()
    assert not ranking.is_clean(PROBLEM, SPACE[0], 87)
    seen.clear()
    assert ranking.is_clean(PROBLEM, SPACE[2], 87)
    assert len({entry for entry in seen if entry[3] == 64}) == 18
    sums = TileConfig(16, 64, 64, scale_sums=True)
    seen.clear()
    assert ranking.is_clean(PROBLEM, sums, 87)
    assert {scheme for scheme, *_ in seen} == {"symmetric"}
    ranking._compiled.cache_clear()
