"""The search: for each problem it ranks the candidates, measures the best of them and keeps the winner.

Results are saved after every problem, so a killed run continues where it was. Several processes may write to the same
files, since each reads, merges and writes under a lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from mebp_triton.kernels.configs import PANEL, Panel, Problem, TileConfig, default_config
from mebp_triton.kernels.tables import (
    DTYPE_NAMES,
    Entry,
    Route,
    Table,
    bucket,
)

from .ceilings import Ceilings, measure_copy_gb_s, measure_matmul_tflop_s
from .cost_model import NOMINAL
from .log import Log, Record, Trial
from .measure import Bench, Measurement, panels, plan
from .rank import rank as rank_by_model
from .results import Results, versions
from .timing import CudaTimer, Limits, Timer

LIMIT = 8
LONGEST_REASON = 400
# Returns the candidates of a problem, best prediction first, and then those that were dropped.
Rank = Callable[[Problem], Sequence[Trial]]
# Called with the number of problems that are done, that of all, and what is done now.
Progress = Callable[[int, int, str], None]


def target_of(architecture: str) -> int:
    """The compute capability whose model serves an architecture: its own, or the last one before it.

    Raises:
        ValueError: there is none, as for another vendor's architecture.
    """
    number = architecture.removeprefix("sm_")
    targets = [target for target in NOMINAL if number.isdecimal() and target <= int(number)]
    if not targets:
        raise ValueError(f"no candidates are known for {architecture!r}, only for sm_{min(NOMINAL)} and later")
    return max(targets)


def model_rank(
    architecture: str,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    execute: bool = False,
) -> Rank:
    """A ``Rank`` that compiles the candidates and ranks them by the model; at most ``limit`` tiles that are fit.

    ``execute``: the best one is executed here, as where no device will; see ``rank.rank``.
    """
    target = target_of(architecture)

    def ranked(problem: Problem) -> list[Trial]:
        ranking = rank_by_model(problem, target, limit, progress, execute)
        return [
            *(
                Trial(
                    candidate.route,
                    round(candidate.prediction.time_us, 3),
                    clocks={limit: round(clocks) for limit, clocks in candidate.prediction.clocks.items()},
                    note=candidate.not_executed,
                )
                for candidate in ranking.kept
            ),
            *(Trial(dropped.config, reason=dropped.reason[:LONGEST_REASON]) for dropped in ranking.dropped),
        ]

    return ranked


@dataclass(frozen=True)
class Machine:
    """The device to measure on, with its name, limits and clock."""

    device: torch.device
    name: str
    limits: Limits
    timer: Timer

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """The machine of a CUDA device."""
        return cls(device, torch.cuda.get_device_name(device), Limits.of(device), CudaTimer(device))


def tune(
    problems: Sequence[Problem],
    machine: Machine,
    results: Results,
    rank: Rank,
    limit: int = LIMIT,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Problem]:
    """Measures, for every problem, the ``limit`` best candidates, the default, and panels, on a GPU of several sizes.

    The candidates are the log's if it has a record of the problem, which may come from another machine, and else
    ``rank``'s. Problems that were measured before on this device with these versions are skipped, unless ``force``.

    Returns:
        The problems that were measured now.
    """
    log, table = results.log(), results.table()
    remaining = [problem for problem in problems if force or not _is_measured(problem, machine, table)]
    _measure_ceilings(remaining, machine, results, force)
    for done, problem in enumerate(remaining):
        if progress is not None:
            progress(done, len(remaining), describe(problem))
        record = log.records.get(bucket(problem))
        ranked = rank(problem) if record is None else record.trials
        # On other devices torch decodes panels, in a workspace of its own size.
        sizes = panels(problem) if machine.device.type == "cuda" else [PANEL]
        shortlist = _shortlist(problem, ranked, limit, sizes, table.get(bucket(problem)))
        record = measure_problem(problem, shortlist, machine)
        results.add(winner(record), record)
    if progress is not None and remaining:
        progress(len(remaining), len(remaining), "")
    return remaining


def tune_offline(
    problems: Sequence[Problem],
    results: Results,
    rank: Rank,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Problem]:
    """Ranks the candidates of every problem without a device. The best prediction becomes a static entry.

    Problems that were ranked before with these versions, by counts, are skipped, unless ``force``.

    Returns:
        The problems that were ranked now.
    """
    log, table = results.log(), results.table()
    remaining = [problem for problem in problems if force or not _is_ranked(problem, log, table)]
    for done, problem in enumerate(remaining):
        if progress is not None:
            progress(done, len(remaining), describe(problem))
        record = Record(problem, tuple(rank(problem)), None, versions())
        results.add(winner(record), record)
    if progress is not None and remaining:
        progress(len(remaining), len(remaining), "")
    return remaining


def describe(problem: Problem) -> str:
    return f"{problem.kernel} M={problem.m} {problem.n}x{problem.k}"


def _is_measured(problem: Problem, machine: Machine, table: Table) -> bool:
    entry = table.get(bucket(problem))
    return (
        entry is not None
        and entry.provenance == "measured"
        and entry.device == machine.name
        and dict(entry.versions) == versions()
    )


def _is_ranked(problem: Problem, log: Log, table: Table) -> bool:
    record = log.records.get(bucket(problem))
    if record is None or bucket(problem) not in table or dict(record.versions) != versions():
        return False
    return any(trial.clocks for trial in record.trials)


def _shortlist(
    problem: Problem, ranked: Iterable[Trial], limit: int, sizes: Iterable[Panel], old: Entry | None
) -> list[tuple[Trial, bool]]:
    """All trials, each with whether to measure it: the best ranked ones, the route in use, the default, and panels."""
    trials = {trial.route: _untimed(trial) for trial in ranked}
    in_use: list[Route] = [default_config(problem), *sizes] + ([] if old is None else [old.route])
    for route in in_use:
        trials.setdefault(route, Trial(route))
    predicted = [trial.route for trial in trials.values() if trial.predicted_us is not None]
    chosen = {*[route for route in predicted if isinstance(route, TileConfig)][:limit], *in_use}
    return [(trial, trial.route in chosen) for trial in trials.values()]


def _untimed(trial: Trial) -> Trial:
    """A trial without its measurement. A reason stays if the candidate was dropped before it was ranked."""
    reason = trial.reason if trial.predicted_us is None else None
    return replace(trial, time_us=None, samples_us=(), reason=reason)


def measure_problem(problem: Problem, shortlist: Sequence[tuple[Trial, bool]], machine: Machine) -> Record:
    """Measures the marked trials in order, each against the best before it."""
    trials = [trial for trial, _ in shortlist]
    chosen = [index for index, (_, marked) in enumerate(shortlist) if marked]
    try:
        smaller, copies = plan(problem, machine.limits)
    except ValueError as error:
        failed = tuple(replace(trial, reason=str(error)) for trial in trials)
        return Record(problem, failed, machine.name, versions())
    bench = Bench(smaller, copies, machine.device, machine.limits)
    best_us = math.inf
    for index in chosen:
        measurement = bench.measure(trials[index].route, machine.timer, best_us)
        trials[index] = _with(trials[index], measurement)
        if measurement.time_us is not None:
            best_us = min(best_us, measurement.time_us)
    return Record(problem, tuple(trials), machine.name, versions(), smaller.m)


def _with(trial: Trial, measurement: Measurement) -> Trial:
    return replace(trial, time_us=measurement.time_us, samples_us=measurement.samples_us, reason=measurement.reason)


def winner(record: Record) -> Entry | None:
    """The entry for the fastest trial, measured if the record is and else predicted; None if no trial works."""
    measured = record.device is not None
    times = [
        (trial.time_us if measured else trial.predicted_us, trial.route)
        for trial in record.trials
        if trial.reason is None
    ]
    timed = [(time_us, route) for time_us, route in times if time_us is not None]
    if not timed:
        return None
    time_us, route = min(timed, key=lambda pair: pair[0])
    provenance = "measured" if measured else "static"
    return Entry(bucket(record.problem), route, provenance, time_us, record.device, record.versions)


def _measure_ceilings(problems: Iterable[Problem], machine: Machine, results: Results, force: bool) -> None:
    """Measures the device's ceilings for every dtype among the problems, unless the log has them."""
    measured = results.log().ceilings.get(machine.name)
    names = dict.fromkeys(DTYPE_NAMES[problem.dtype] for problem in problems)
    missing = [name for name in names if force or measured is None or name not in measured.tflop_s]
    if not missing:
        return
    arguments = (machine.device, machine.timer, machine.limits)
    rates = {name: measure_matmul_tflop_s(*arguments, getattr(torch, name)) for name in missing}
    results.add_ceilings(machine.name, Ceilings(measure_copy_gb_s(*arguments), rates))
