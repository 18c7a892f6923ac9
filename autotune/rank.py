"""The offline half of the tuner: it compiles a problem's candidates, drops the unfit, and ranks the rest by the model.

``static_table`` does this for many problems of one architecture, and settles on few configurations that serve them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from mebp_triton.kernels.configs import TUNED, Problem, TileConfig
from mebp_triton.kernels.names import GROUP_SIZES, SCHEMES
from mebp_triton.kernels.tables import Entry, Route

from .compile import TENSOR_MEMORY_LIMIT, StaticReport, report
from .cost_model import NOMINAL, Prediction, predict, predict_panel
from .emulator.faults import NotModelled
from .execute import TripCounts, trip_counts
from .space import candidates

# Called with the number of compilations that are done, and that of all.
Progress = Callable[[int, int], None]

# A problem takes a configuration that others use too, if that is predicted to lose no more than this share of time.
TOLERANCE = 0.05
# Most configurations of one kernel and architecture in a shipped table, so that tests can compile them.
MOST_CONFIGS = 6
# A size that every block divides. A compiled kernel depends on no more than that of its sizes.
EVEN_SIZE = 4096


@dataclass(frozen=True)
class Candidate:
    """A route, its prediction, its static report (None for the panel route), and why it was not executed (or None)."""

    route: Route
    prediction: Prediction
    report: StaticReport | None = None
    not_executed: str | None = None


@dataclass(frozen=True)
class Dropped:
    """A configuration that is not worth measuring, its static report (None if it does not compile), and why."""

    config: TileConfig
    report: StaticReport | None
    reason: str


@dataclass(frozen=True)
class Ranking:
    """The candidates that are fit, best first, and the dropped configurations, in the order of the search space."""

    kept: list[Candidate]
    dropped: list[Dropped]


def unfit(problem: Problem, static: StaticReport) -> str | None:
    """Why a compiled configuration must not be launched for the problem; None if nothing speaks against it."""
    if static.spill_bytes:
        return f"spills {static.spill_bytes} bytes a thread"
    if static.shared_bytes > static.shared_limit:
        return f"takes {static.shared_bytes} bytes of shared memory, limit {static.shared_limit}"
    if static.tensor_memory > TENSOR_MEMORY_LIMIT:
        return f"takes {static.tensor_memory} columns of tensor memory, limit {TENSOR_MEMORY_LIMIT}"
    if static.loop is None:
        return "has no main loop with matrix instructions"
    if static.target_sm >= 80 and static.conversions:
        return f"converts integers in the main loop, {static.conversions} times a trip"
    narrow = problem.dtype != torch.float32
    if static.target_sm == 90 and problem.m >= 64 and narrow and static.loop.tensor != "HGMMA":
        return f"uses {static.loop.tensor} where sm_90 has HGMMA"
    return None


def rank(problem: Problem, target_sm: int, limit: int | None = None, progress: Progress | None = None) -> Ranking:
    """Compiles, counts and ranks all candidates of a problem. The panel route is always one of them.

    Configurations that differ in nothing but their split share the report of the one that is not split.

    Args:
        problem: ``matmul`` or ``matmul_dx``.
        target_sm: compute capability, such as 87; no such GPU need be there.
        limit: how many candidates to keep, besides the panel route; all if not given.
        progress: called after each candidate.
    """
    fit: list[Fit] = []
    dropped = []
    configs = candidates(problem, target_sm)
    for done, config in enumerate(configs, 1):
        plain = _representative(config)
        static = compiled(problem, plain, target_sm)
        reason = static if isinstance(static, str) else unfit(problem, static)
        if isinstance(static, str) or reason is not None:
            dropped.append(Dropped(config, None if isinstance(static, str) else static, str(reason)))
        else:
            fit.append(Fit(config, static, counted(problem, plain, target_sm)))
        if progress is not None:
            progress(done, len(configs))
    kept = [
        Candidate(one.config, prediction, one.report, one.counts if isinstance(one.counts, str) else None)
        for one, prediction in zip(fit, predict_alike(problem, fit, target_sm), strict=True)
    ]
    kept.sort(key=lambda candidate: candidate.prediction.time_us)
    kept = [*kept[:limit], Candidate(None, predict_panel(problem, NOMINAL[target_sm]))]
    return Ranking(sorted(kept, key=lambda candidate: candidate.prediction.time_us), dropped)


@dataclass(frozen=True)
class Fit:
    """A configuration that can be launched, its static report, and the counts of a trip, or why there are none."""

    config: TileConfig
    report: StaticReport
    counts: TripCounts | str


def predict_alike(problem: Problem, fit: Sequence[Fit], target_sm: int) -> list[Prediction]:
    """Predicts launches of a problem that can be compared.

    Where nobody counted, shared memory would look free. So counts are used if there are counts of all.
    """
    counts = [None if isinstance(one.counts, str) else one.counts for one in fit]
    if None in counts:
        counts = [None] * len(fit)
    device = NOMINAL[target_sm]
    return [predict(problem, one.config, one.report, device, found) for one, found in zip(fit, counts, strict=True)]


def compiled(
    problem: Problem, config: TileConfig, target_sm: int, rank: int = 16, bias: bool = False
) -> StaticReport | str:
    """The static report, shared by all problems that compile to the same code; or the compiler's objection."""
    return _compiled(_of_same_code(problem, config), config, target_sm, rank, bias)


def counted(problem: Problem, config: TileConfig, target_sm: int) -> TripCounts | str:
    """The counts of one trip, shared like the report; or in words why the code could not be executed."""
    return _counted(_of_same_code(problem, config), config, target_sm)


def _of_same_code(problem: Problem, config: TileConfig) -> Problem:
    """One problem for all that compile to the same code."""
    return replace(problem, m=EVEN_SIZE, n=_alike(problem.n, config.block_n), k=_alike(problem.k, config.block_k))


def _alike(size: int, block: int) -> int:
    """Returns one size for all sizes that ``block`` and 16 divide, or do not divide, in the same way."""
    return EVEN_SIZE if size % block == 0 else EVEN_SIZE + 16 if size % 16 == 0 else EVEN_SIZE + 1


@cache
def _compiled(problem: Problem, config: TileConfig, target_sm: int, rank: int, bias: bool) -> StaticReport | str:
    try:
        return report(problem, config, target_sm, rank, bias)
    except (triton.TritonError, RuntimeError) as error:
        return f"does not compile: {(str(error).splitlines() or [''])[-1].strip()}"


@cache
def _counted(problem: Problem, config: TileConfig, target_sm: int) -> TripCounts | str:
    try:
        return trip_counts(problem, config, target_sm)
    except NotModelled as error:
        return f"not executed: {error}"


def static_table(problems: Sequence[Problem], target_sm: int, progress: Progress | None = None) -> list[Entry]:
    """Chooses the entries of a table without a GPU.

    A configuration is ranked by its code for the symmetric scheme with groups of 64. Before it is chosen, it is
    compiled for every scheme, group size and 16-bit dtype, and dropped if it is unfit for any of them.

    Args:
        problems: different problems of 16-bit dtypes, whose sizes are bucket bounds.
        target_sm: compute capability.
        progress: called after each compilation of the ranking, kernel by kernel.
    """
    versions = {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}
    entries = []
    for kernel in TUNED:
        mine = [problem for problem in problems if problem.kernel == kernel]
        kinds = list(dict.fromkeys(_kind(problem, target_sm) for problem in mine))
        settled = dict(zip(kinds, _settle(kinds, _predictions(kinds, target_sm, progress), target_sm), strict=True))
        for problem in mine:
            route, time_us = settled[_kind(problem, target_sm)]
            entries.append(Entry(problem, route, "static", round(time_us, 2), None, versions))
    return entries


def _kind(problem: Problem, target_sm: int) -> Problem:
    """A problem that stands for all with the same candidates and predictions.

    The model does not tell 16-bit dtypes apart. Only in the symmetric scheme can sums be scaled, within a group.
    """
    group_size = problem.group_size if problem.scheme == "symmetric" else 64
    scheme = "symmetric" if problem.scheme == "symmetric" else "affine"
    return replace(problem, scheme=scheme, group_size=group_size, dtype=_dtypes(target_sm)[0])


def _predictions(problems: Sequence[Problem], target_sm: int, progress: Progress | None) -> list[dict[Route, float]]:
    """Returns, for each problem, the predicted microseconds of every route that is fit for it."""
    spaces = [candidates(problem, target_sm) for problem in problems]
    total = len({_representative(config) for space in spaces for config in space})
    done: set[TileConfig] = set()
    times: list[dict[Route, float]] = []
    for problem, space in zip(problems, spaces, strict=True):
        fit: list[Fit] = []
        for config in space:
            plain = _representative(config)
            stands = _plain_problem(problem, config, target_sm)
            static = compiled(stands, plain, target_sm)
            if progress is not None and plain not in done:
                done.add(plain)
                progress(len(done), total)
            if not isinstance(static, str) and unfit(problem, static) is None:
                fit.append(Fit(config, static, counted(stands, plain, target_sm)))
        routes: dict[Route, float] = {None: predict_panel(problem, NOMINAL[target_sm]).time_us}
        for one, prediction in zip(fit, predict_alike(problem, fit, target_sm), strict=True):
            routes[one.config] = prediction.time_us
        times.append(routes)
    return times


def _representative(config: TileConfig) -> TileConfig:
    """The configuration whose report stands for this one, since a split hardly changes the main loop."""
    return replace(config, split=1)


def _plain_problem(problem: Problem, config: TileConfig, target_sm: int) -> Problem:
    """A problem whose report stands for all schemes, group sizes and dtypes."""
    group_size = max(64, config.block_k) if config.scale_sums else 64
    return replace(problem, scheme="symmetric", group_size=group_size, dtype=_dtypes(target_sm)[0])


def _dtypes(target_sm: int) -> list[torch.dtype]:
    """The 16-bit dtypes that one trains in on a target. Before sm_80 there is no bfloat16."""
    return [torch.bfloat16, torch.float16] if target_sm >= 80 else [torch.float16]


def _settle(problems: Sequence[Problem], times: list[dict[Route, float]], target_sm: int) -> list[tuple[Route, float]]:
    """A route for each problem, from few configurations: greedily the one that saves the most time, if it is clean."""
    times = [dict(routes) for routes in times]
    chosen: list[Route] = [None]
    while len(chosen) <= MOST_CONFIGS:
        excess = [_excess(routes, chosen) for routes in times]
        if max(excess, default=0.0) <= math.log1p(TOLERANCE):
            break
        saved: dict[Route, float] = {}
        for routes, before in zip(times, excess, strict=True):
            best = min(routes.values())
            for route, time_us in routes.items():
                saved[route] = saved.get(route, 0.0) + max(0.0, before - math.log(time_us / best))
        config = max(saved, key=lambda route: saved[route])
        assert config is not None, "the panel route is chosen already"
        if is_clean(problems[0], config, target_sm):
            chosen.append(config)
        else:
            for routes in times:
                routes.pop(config, None)
    return [
        min(((route, routes[route]) for route in chosen if route in routes), key=lambda pair: pair[1])
        for routes in times
    ]


def _excess(routes: dict[Route, float], chosen: Iterable[Route]) -> float:
    """The logarithm of how many times slower the best chosen route is than the best of all."""
    return math.log(min(routes[route] for route in chosen if route in routes) / min(routes.values()))


def is_clean(problem: Problem, config: TileConfig, target_sm: int) -> bool:
    """Whether a configuration is fit for all schemes, group sizes and dtypes that it suits, with LoRA and bias."""
    plain = compiled(_plain_problem(problem, config, target_sm), _representative(config), target_sm)
    assert not isinstance(plain, str) and plain.loop is not None
    # A configuration that uses HGMMA serves many tokens, and then must use it for every kind of weight.
    m = 64 if plain.loop.tensor == "HGMMA" else 16
    for variant, rank, bias in variants(replace(problem, m=m), target_sm):
        if config.suits(variant):
            static = compiled(variant, config, target_sm, rank, bias)
            if isinstance(static, str) or unfit(variant, static) is not None:
                return False
    return True


def variants(problem: Problem, target_sm: int) -> list[tuple[Problem, int, bool]]:
    """Returns the problems that a shipped configuration must fit, hardest first: (problem, LoRA rank, with bias)."""
    bias = problem.kernel == "matmul"
    dtypes = _dtypes(target_sm)
    kinds = [
        replace(problem, scheme=scheme, group_size=group_size, dtype=dtype)
        for scheme in reversed(SCHEMES)
        for group_size in GROUP_SIZES
        for dtype in dtypes
    ]
    plain = [kind for kind in kinds if kind.scheme == "symmetric" and kind.dtype == dtypes[0]]
    return [(kind, 64, bias) for kind in kinds] + [(kind, 16, False) for kind in plain]
