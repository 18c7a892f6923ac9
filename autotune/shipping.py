"""Chooses the tables that are shipped: few configurations of an architecture that serve many problems.

Whatever is chosen is compiled and executed for every kind of weight that may meet it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from mebp_triton.kernels.configs import PANEL, TUNED, Problem, TileConfig
from mebp_triton.kernels.names import GROUP_SIZES, SCHEMES, Scheme
from mebp_triton.kernels.tables import DTYPE_NAMES, Entry, Route

from .cost_model import NOMINAL, predict_panel
from .emulator.faults import NotModelled
from .rank import Fit, compiled, examine, executed, predict_alike, representative, stages, unfit
from .results import versions
from .space import candidates

# A problem takes a configuration that others use too, if that is predicted to lose no more than this share of time.
TOLERANCE = 0.05
# Most configurations of one kernel and architecture in a shipped table, so that tests can compile them.
MOST_CONFIGS = 6
# Schemes and group sizes of 8 bits that stand for all of them.
EIGHT_BITS: tuple[tuple[Scheme, int], ...] = (("affine", 16), ("symmetric", 16), ("symmetric", 128))
# Called with a line that says what has been done.
Say = Callable[[str], None]


def static_table(problems: Sequence[Problem], target_sm: int, say: Say = str) -> list[Entry]:
    """Chooses the entries of a table without a GPU.

    A configuration is ranked by its code for the symmetric scheme with groups of 64. Before it is chosen, it is
    compiled and executed for every scheme, group size and 16-bit dtype, and dropped if it is unfit or wrong for any of
    them.

    Args:
        problems: different problems of 16-bit dtypes, whose sizes are bucket bounds.
        target_sm: compute capability.
        say: called with a line for each configuration that was ranked, chosen or dropped.
    """
    entries = []
    for kernel in TUNED:
        mine = [problem for problem in problems if problem.kernel == kernel]
        kinds = list(dict.fromkeys(_kind(problem, target_sm) for problem in mine))
        times = _predictions(kinds, target_sm, say)
        settled = dict(zip(kinds, _settle(kinds, times, target_sm, say), strict=True))
        for problem in mine:
            route, time_us = settled[_kind(problem, target_sm)]
            entries.append(Entry(problem, route, "static", round(time_us, 2), None, versions()))
    return entries


def _kind(problem: Problem, target_sm: int) -> Problem:
    """A problem that stands for all with the same candidates and predictions.

    The model does not tell 16-bit dtypes apart. Only in the symmetric scheme can sums be scaled, within a group.
    """
    group_size = problem.group_size if problem.scheme == "symmetric" else 64
    scheme = "symmetric" if problem.scheme == "symmetric" else "affine"
    return replace(problem, scheme=scheme, group_size=group_size, dtype=_dtypes(target_sm)[0])


def _predictions(problems: Sequence[Problem], target_sm: int, say: Say) -> list[dict[Route, float]]:
    """Returns, for each problem, the predicted microseconds of every route that is fit for it."""
    spaces = [candidates(problem, target_sm) for problem in problems]
    total = len({representative(config) for space in spaces for config in space})
    done: set[TileConfig] = set()
    times: list[dict[Route, float]] = []
    for problem, space in zip(problems, spaces, strict=True):
        fit: list[Fit] = []
        for config in space:
            plain = representative(config)
            examined = examine(problem, config, target_sm, _plain_problem(problem, config, target_sm))
            if isinstance(examined, Fit):
                fit.append(examined)
            if plain not in done:
                done.add(plain)
                counts = examined.counts if isinstance(examined, Fit) else examined.reason
                remark = f": {counts}" if isinstance(counts, str) else ""
                say(f"{len(done)} of {total} candidates, {problem.kernel} {plain}{remark}")
        routes: dict[Route, float] = {PANEL: predict_panel(problem, NOMINAL[target_sm]).time_us}
        for one, prediction in zip(fit, predict_alike(problem, fit, target_sm), strict=True):
            routes[one.config] = prediction.time_us
        times.append(routes)
    return times


def _plain_problem(problem: Problem, config: TileConfig, target_sm: int) -> Problem:
    """A problem whose report stands for all schemes, group sizes and dtypes."""
    group_size = max(64, config.block_k) if config.scale_sums else 64
    return replace(problem, scheme="symmetric", group_size=group_size, dtype=_dtypes(target_sm)[0])


def _dtypes(target_sm: int) -> list[torch.dtype]:
    """The 16-bit dtypes that one trains in on a target. Before sm_80 there is no bfloat16."""
    return [torch.bfloat16, torch.float16] if target_sm >= 80 else [torch.float16]


def _settle(
    problems: Sequence[Problem], times: list[dict[Route, float]], target_sm: int, say: Say = str
) -> list[tuple[Route, float]]:
    """A route for each problem, from few configurations: greedily the one that saves the most time, if it is sound."""
    times = [dict(routes) for routes in times]
    chosen: list[Route] = [PANEL]
    while len(chosen) <= MOST_CONFIGS:
        excess = [_excess(routes, chosen) for routes in times]
        if max(excess, default=0.0) <= math.log1p(TOLERANCE):
            break
        saved: dict[Route, float] = {}
        for routes, before in zip(times, excess, strict=True):
            best = min(routes.values())
            for route, time_us in routes.items():
                saved[route] = saved.get(route, 0.0) + max(0.0, before - math.log(time_us / best))
        config = max(saved, key=lambda route: (saved[route], stages(route)))
        assert isinstance(config, TileConfig), "the panel route is chosen already"
        reason = objection(problems[0], config, target_sm, say)
        say(f"{'chosen' if reason is None else 'dropped'}, {problems[0].kernel} {config}: {reason or 'sound'}")
        if reason is None:
            chosen.append(config)
        else:
            for routes in times:
                routes.pop(config, None)
    return [
        min(
            ((route, routes[route]) for route in chosen if route in routes),
            key=lambda pair: (pair[1], -stages(pair[0])),
        )
        for routes in times
    ]


def _excess(routes: dict[Route, float], chosen: Iterable[Route]) -> float:
    """The logarithm of how many times slower the best chosen route is than the best of all."""
    return math.log(min(routes[route] for route in chosen if route in routes) / min(routes.values()))


def objection(problem: Problem, config: TileConfig, target_sm: int, say: Say = str) -> str | None:
    """Why a configuration must not be shipped; None if nothing speaks against it.

    It must be fit, and right when it is executed, for all schemes, group sizes, widths and dtypes, with LoRA and bias,
    and for scales of two levels; and right for three weights with one input, in each scheme. Where its scaled sums do
    not suit a kind of weight, weights are scaled, as a launch does it.

    Args:
        problem: its kernel and sizes are taken.
        config: the configuration.
        target_sm: compute capability.
        say: called with what was not executed, and why.
    """
    plain = compiled(_plain_problem(problem, config, target_sm), representative(config), target_sm)
    assert not isinstance(plain, str) and plain.loop is not None
    # A configuration that uses HGMMA serves many tokens, and then must use it for every kind of weight.
    m = 64 if plain.loop.tensor == "HGMMA" else 16
    skipped: dict[str, int] = {}
    for kind in variants(replace(problem, m=m), target_sm):
        variant, options = kind.problem, {"rank": kind.rank, "bias": kind.bias, "scale_dtype": kind.scale_dtype}
        taken = config if config.suits(variant) else replace(config, scale_sums=False)
        static = compiled(variant, taken, target_sm, **options)
        reason = static if isinstance(static, str) else unfit(variant, static)
        for ragged in (False, True):
            if reason is None and (not ragged or _for_three(kind, target_sm)):
                try:
                    reason = executed(variant, taken, target_sm, **options, ragged=ragged)
                except NotModelled as error:
                    skipped[str(error)] = skipped.get(str(error), 0) + 1
        if reason is not None:
            levels = ", scales of two levels" if kind.scale_dtype == torch.int8 else ""
            return f"{variant.form}{levels}, {DTYPE_NAMES[variant.dtype]}: {reason}"
    for error, times in skipped.items():
        say(f"not executed, {times} times, {problem.kernel} {config}: {error}")
    return None


class Variant(NamedTuple):
    """A launch that a shipped configuration must fit: what for, LoRA's rank, whether with bias, and the scales' dtype.

    A dtype of int8 stands for scales of two levels.
    """

    problem: Problem
    rank: int
    bias: bool
    scale_dtype: torch.dtype = torch.float16


def _for_three(variant: Variant, target_sm: int) -> bool:
    """Whether a variant is one of those, one in each scheme, that are executed for three weights as well."""
    problem = variant.problem
    # Scaled sums need large groups.
    group_size = max(GROUP_SIZES) if problem.scheme == "symmetric" else min(GROUP_SIZES)
    kind = variant.rank, variant.scale_dtype, problem.bits, problem.group_size, problem.dtype
    return kind == (64, torch.float16, 4, group_size, _dtypes(target_sm)[0])


def variants(problem: Problem, target_sm: int) -> list[Variant]:
    """Returns the launches that a shipped configuration must fit, hardest first."""
    bias = problem.kernel == "matmul"
    dtypes = _dtypes(target_sm)
    kinds = [
        replace(problem, scheme=scheme, group_size=group_size, dtype=dtype)
        for scheme in reversed(SCHEMES)
        for group_size in GROUP_SIZES
        for dtype in dtypes
    ]
    # An entry for 4 bits also stands in for 8 bits. These need the most registers, and the third lets sums be scaled.
    eight = [
        replace(problem, scheme=scheme, group_size=group_size, dtype=dtypes[0], bits=8)
        for scheme, group_size in EIGHT_BITS
    ]
    plain = [kind for kind in kinds if kind.scheme == "symmetric" and kind.dtype == dtypes[0]]
    two_levels = [
        replace(problem, scheme=scheme, group_size=group_size, dtype=dtypes[0])
        for scheme, group_size in zip(SCHEMES, reversed(GROUP_SIZES), strict=True)
    ]
    return [
        *(Variant(kind, 64, bias) for kind in kinds + eight),
        *(Variant(kind, 64, bias, torch.int8) for kind in [*two_levels, eight[0]]),
        *(Variant(kind, 16, False) for kind in plain),
    ]
