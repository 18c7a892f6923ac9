"""The offline half of the tuner: it compiles a problem's candidates, drops the unfit, and ranks the rest by the model.

Candidates are executed on the emulator as well: all for a trip of their main loop, whose work is counted, and those
that are to be launched for a result, which must be right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from mebp_triton.kernels.configs import PANEL, Panel, Problem, TileConfig
from mebp_triton.kernels.tables import Route

from .compile import TENSOR_MEMORY_LIMIT, StaticReport, report
from .cost_model import NOMINAL, Prediction, predict, predict_panel
from .emulator.faults import NotModelled
from .execute import TripCounts, fault, rest, trip_counts
from .space import candidates

# Called with the number of compilations that are done, and that of all.
Progress = Callable[[int, int], None]

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
    # Rows of sizes that 16 does not divide cannot be copied by whole words.
    aligned = problem.n % 16 == problem.k % 16 == 0
    if static.target_sm >= 80 and aligned and static.loop.loads:
        return f"waits for loads in the main loop, {static.loop.loads} a trip"
    if static.warnings:
        return f"is not what ptxas likes: {static.warnings[0]}"
    narrow = problem.dtype != torch.float32
    if static.target_sm == 90 and problem.m >= 64 and narrow and static.loop.tensor != "HGMMA":
        return f"uses {static.loop.tensor} where sm_90 has HGMMA"
    return None


def rank(
    problem: Problem,
    target_sm: int,
    limit: int | None = None,
    progress: Progress | None = None,
    execute: bool = False,
) -> Ranking:
    """Compiles, counts and ranks all candidates of a problem. The panel route is always one of them.

    Configurations that differ in nothing but their split share the report of the one that is not split.

    Args:
        problem: ``matmul`` or ``matmul_dx``.
        target_sm: compute capability, such as 87; no such GPU need be there.
        limit: how many candidates to keep, besides the panel route; all if not given.
        progress: called after each candidate.
        execute: whether to launch the best candidate on the emulator. If it is wrong it is dropped, and the next one is
            launched. Nothing is known about the candidates behind the best, nor about the panel route.
    """
    fit: list[Fit] = []
    dropped = []
    configs = candidates(problem, target_sm)
    for done, config in enumerate(configs, 1):
        examined = examine(problem, config, target_sm, problem)
        if isinstance(examined, Fit):
            fit.append(examined)
        else:
            dropped.append(examined)
        if progress is not None:
            progress(done, len(configs))
    kept = [
        Candidate(one.config, prediction, one.report, one.counts if isinstance(one.counts, str) else None)
        for one, prediction in zip(fit, predict_alike(problem, fit, target_sm), strict=True)
    ]
    kept.append(Candidate(PANEL, predict_panel(problem, NOMINAL[target_sm])))
    kept.sort(key=lambda candidate: (candidate.prediction.time_us, -stages(candidate.route)))
    if execute:
        dropped += _drop_wrong(problem, kept, target_sm)
    tiles = [candidate for candidate in kept if candidate.route != PANEL][:limit]
    return Ranking([candidate for candidate in kept if candidate.route == PANEL or candidate in tiles], dropped)


def stages(route: Route) -> int:
    """The depth of a route's pipeline. Of configurations that the model does not tell apart, the deepest is taken."""
    return 0 if isinstance(route, Panel) else route.num_stages


def _drop_wrong(problem: Problem, kept: list[Candidate], target_sm: int) -> list[Dropped]:
    """Takes candidates off the front of ``kept`` until the first one is right, or cannot be executed."""
    dropped = []
    while isinstance(config := kept[0].route, TileConfig) and kept[0].not_executed is None:
        first = kept[0]
        try:
            reason = _wrong(problem, config, target_sm)
        except NotModelled as error:
            kept[0] = replace(first, not_executed=f"not executed: {error}")
            break
        if reason is None:
            break
        dropped.append(Dropped(config, first.report, reason))
        del kept[0]
    return dropped


def _wrong(problem: Problem, config: TileConfig, target_sm: int) -> str | None:
    """Why a configuration must not be launched, as split as it is; in a launch of its own, and with three weights."""
    static = compiled(problem, config, target_sm)
    if isinstance(static, str):
        return static
    reasons = (executed(problem, config, target_sm, ragged=ragged) for ragged in (False, True))
    return unfit(problem, static) or next((reason for reason in reasons if reason is not None), None)


@dataclass(frozen=True)
class Fit:
    """A configuration that can be launched, its static report, and the counts of a trip, or why there are none."""

    config: TileConfig
    report: StaticReport
    counts: TripCounts | str


def examine(problem: Problem, config: TileConfig, target_sm: int, code: Problem) -> Fit | Dropped:
    """Compiles a configuration, and counts a trip if it is fit for ``problem``; ``code`` says what is compiled."""
    plain = representative(config)
    static = compiled(code, plain, target_sm)
    if isinstance(static, str):
        return Dropped(config, None, static)
    reason = unfit(problem, static)
    return Fit(config, static, counted(code, plain, target_sm)) if reason is None else Dropped(config, static, reason)


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
    problem: Problem,
    config: TileConfig,
    target_sm: int,
    rank: int = 16,
    bias: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> StaticReport | str:
    """The static report, shared by all problems that compile to the same code; or the compiler's objection."""
    return _compiled(_of_same_code(problem, config), config, target_sm, rank, bias, scale_dtype)


def counted(problem: Problem, config: TileConfig, target_sm: int) -> TripCounts | str:
    """The counts of one trip, shared like the report; or in words why the code could not be executed."""
    return _counted(_of_same_code(problem, config), config, target_sm)


def executed(
    problem: Problem,
    config: TileConfig,
    target_sm: int,
    rank: int = 16,
    bias: bool = False,
    ragged: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> str | None:
    """Executes by ``execute.fault``, shared like the report. NotModelled as there."""
    return _executed(_of_same_code(problem, config), config, target_sm, rank, bias, ragged, scale_dtype)


def _of_same_code(problem: Problem, config: TileConfig) -> Problem:
    """One problem for all that compile to the same code."""
    n, k = EVEN_SIZE + rest(problem.n, config.block_n), EVEN_SIZE + rest(problem.k, config.block_k)
    return replace(problem, m=EVEN_SIZE, n=n, k=k)


@cache
def _compiled(
    problem: Problem, config: TileConfig, target_sm: int, rank: int, bias: bool, scale_dtype: torch.dtype
) -> StaticReport | str:
    try:
        return report(problem, config, target_sm, rank, bias, scale_dtype)
    except (triton.TritonError, RuntimeError) as error:
        return f"does not compile: {(str(error).splitlines() or [''])[-1].strip()}"


@cache
def _counted(problem: Problem, config: TileConfig, target_sm: int) -> TripCounts | str:
    try:
        return trip_counts(problem, config, target_sm)
    except NotModelled as error:
        return f"not executed: {error}"


@cache
def _executed(
    problem: Problem,
    config: TileConfig,
    target_sm: int,
    rank: int,
    bias: bool,
    ragged: bool,
    scale_dtype: torch.dtype,
) -> str | None:
    return fault(problem, config, target_sm, rank, bias, ragged, scale_dtype)


def representative(config: TileConfig) -> TileConfig:
    """The configuration whose report stands for this one, since a split hardly changes the main loop."""
    return replace(config, split=1)
