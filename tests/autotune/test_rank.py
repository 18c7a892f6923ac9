"""Candidates are compiled, dropped for a reason or ranked, and few of them are chosen for a whole table."""

from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune import rank as ranking
from mebp_triton.autotune.compile import SHARED_LIMITS, StaticReport
from mebp_triton.autotune.cost_model import LIMITS, Prediction
from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.execute import TripCounts
from mebp_triton.autotune.rank import Fit, compiled, rank, unfit
from mebp_triton.autotune.sass import LoopCounts
from mebp_triton.kernels.configs import PANEL, Problem, TileConfig

PROBLEM = Problem("matmul", 64, 4096, 4096)
SPACE = [
    TileConfig(64, 64, 64, num_warps=4, num_stages=2),
    TileConfig(64, 64, 64, num_warps=4, num_stages=2, split=2),
    TileConfig(64, 128, 64, num_warps=8, num_stages=2),
]
WASTEFUL = TileConfig(64, 256, 64, num_warps=2, num_stages=2)


SERIALIZED = "ptxas info : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized"


def made(target_sm=90, tensor="HGMMA", conversions=0, loads=0, **changes):
    loop = LoopCounts(250, 4, 120, 40, conversions, tensor, loads)
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
        (made(80, "HMMA", loads=2), "waits for loads in the main loop, 2 a trip"),
        (made(75, "FFMA", loads=2), None),
        (made(warnings=(SERIALIZED,)), "(C7515)"),
    ],
)
def test_reasons(report, reason):
    found = unfit(PROBLEM, report)
    assert found is None if reason is None else found is not None and reason in found


def test_loads_that_cannot_be_pipelined_are_allowed():
    """Rows that 16 does not divide are not copied by whole words."""
    for problem in (replace(PROBLEM, n=4097), replace(PROBLEM, k=4104)):
        assert unfit(problem, made(80, "HMMA", loads=2)) is None


def test_hgmma_is_asked_of_many_tokens_in_16_bits_only():
    assert unfit(replace(PROBLEM, m=32), made(90, "HMMA")) is None
    assert unfit(replace(PROBLEM, dtype=torch.float32), made(90, "FFMA")) is None


def test_rank(small_space):
    done = []
    found = rank(PROBLEM, 87, progress=lambda *state: done.append(state))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {candidate.route for candidate in found.kept} == {PANEL, *SPACE}
    times = [candidate.prediction.time_us for candidate in found.kept]
    assert times == sorted(times) and times[0] > 0
    for candidate in found.kept:
        assert (candidate.report is None) == (candidate.route == PANEL)
        assert candidate.report is None or unfit(PROBLEM, candidate.report) is None
    (dropped,) = found.dropped
    assert dropped.config == WASTEFUL and dropped.report is not None and "spills" in dropped.reason
    limited = rank(PROBLEM, 87, limit=1)
    assert len(limited.kept) == 2 and PANEL in [candidate.route for candidate in limited.kept]
    tiles = [candidate for candidate in found.kept if candidate.route != PANEL]
    assert tiles[0] in limited.kept


def test_of_equals_the_deepest_pipeline_comes_first(small_space, monkeypatch):
    deep = [replace(SPACE[0], num_stages=stages) for stages in (2, 4, 3)]
    monkeypatch.setattr(ranking, "candidates", lambda problem, target_sm: deep)
    monkeypatch.setattr(ranking, "examine", lambda problem, config, target_sm, code: Fit(config, made(87, "HMMA"), ""))
    alike = Prediction(1.0, dict.fromkeys(LIMITS, 1.0))
    monkeypatch.setattr(ranking, "predict_alike", lambda problem, fit, target_sm: [alike] * len(fit))
    routes = [candidate.route for candidate in rank(PROBLEM, 87).kept]
    assert [route.num_stages for route in routes if route != PANEL] == [4, 3, 2]


def test_shared_memory_is_counted(small_space):
    found = rank(PROBLEM, 87)
    for candidate in found.kept:
        assert candidate.not_executed is None
        assert (candidate.prediction.clocks.get("shared memory", 0) > 0) == (candidate.route != PANEL)


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
    tiles = {candidate.route: candidate for candidate in found.kept if candidate.route != PANEL}
    assert tiles.keys() == set(SPACE)
    assert tiles[SPACE[2]].not_executed == "not executed: line 7: tcgen05.alloc: this instruction is not modelled"
    assert tiles[SPACE[0]].not_executed is None
    assert {candidate.prediction.clocks["shared memory"] for candidate in tiles.values()} == {0.0}


@pytest.fixture
def faults(small_space, monkeypatch):
    """What executing finds, by configuration; an exception is raised."""
    found, launched = {}, []

    def fault(problem, config, target_sm, rank, bias, ragged, scale_dtype):
        launched.append((config, ragged))
        if isinstance(found.get(config), Exception):
            raise found[config]
        return found.get(config) if ragged else None

    monkeypatch.setattr(ranking, "fault", fault)
    ranking._executed.cache_clear()
    yield found, launched
    ranking._executed.cache_clear()


def test_the_first_one_that_is_right_comes_first(faults):
    """What is better than that is dropped; what is worse is not executed."""
    found, launched = faults
    best, second, third = [candidate.route for candidate in rank(PROBLEM, 87).kept][:3]
    assert launched == [] and PANEL not in (best, second)
    found[best] = "wrong result: not finite"
    ranking._executed.cache_clear()
    after = rank(PROBLEM, 87, limit=1, execute=True)
    assert [candidate.route for candidate in after.kept if candidate.route != PANEL] == [second]
    assert ("wrong result: not finite", best) in [(dropped.reason, dropped.config) for dropped in after.dropped]
    assert launched == [(best, False), (best, True), (second, False), (second, True)]


def test_what_cannot_be_launched_stays_first(faults):
    found, launched = faults
    found |= dict.fromkeys(SPACE, NotModelled("line 9: setmaxnreg: this instruction is not modelled"))
    (first, *others) = [candidate for candidate in rank(PROBLEM, 87, execute=True).kept if candidate.route != PANEL]
    assert first.not_executed == "not executed: line 9: setmaxnreg: this instruction is not modelled"
    assert len(launched) == 1 and not any(candidate.not_executed for candidate in others)


def test_a_split_that_is_unfit_is_dropped(faults, monkeypatch):
    """It was ranked by the report of the one that is not split."""
    split = SPACE[1]
    monkeypatch.setattr(ranking, "candidates", lambda problem, target_sm: [split])
    monkeypatch.setattr(ranking, "counted", lambda *arguments: TripCounts(300, 300, 0, 300, 300))
    monkeypatch.setattr(
        ranking, "compiled", lambda problem, config, sm: made(87, "HMMA", spill_bytes=8 if config.split > 1 else 0)
    )
    found = rank(PROBLEM, 87, execute=True)
    assert [(dropped.config, dropped.reason) for dropped in found.dropped] == [(split, "spills 8 bytes a thread")]


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
    assert [candidate.route for candidate in found.kept] == [PANEL]
    assert {dropped.reason for dropped in found.dropped} == {"does not compile: the compiler's objection"}
    assert all(dropped.report is None for dropped in found.dropped)
