"""A report of tuning: the winners beside the best that a device can do, what bounds them, and how others lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mebp_triton.kernels.configs import Panel
from mebp_triton.kernels.tables import DTYPE_NAMES, Entry, Route, Table

from .ceilings import Ceilings
from .cost_model import NOMINAL, bound_of
from .log import Log, Record
from .measure import bytes_moved, flops
from .tune import target_of


@dataclass(frozen=True)
class Loss:
    """A candidate that lost: by how much (0.3 if it takes 30 % longer than the winner), or why it has no time."""

    route: str
    time_us: float | None
    slower_by: float | None
    reason: str | None


@dataclass(frozen=True)
class Row:
    """The report's row of one problem.

    Attributes:
        kernel, m, n, k, scheme, group_size, bits, dtype: the real problem, or its bucket if no log names the problem.
        route: the winner.
        provenance: "measured", or "static" if times and rates are predictions.
        device: the name of the device that measured; None for predictions.
        time_us: microseconds per call.
        gb_s, tflop_s: achieved rates, counting packed weights, scales, X and Y, and 2·M·N·K operations; None if no log
            names the problem.
        of_copy, of_matmul: the rates as a share of the ceilings; None without ceilings.
        bound: what bounds the launch, one of ``cost_model.LIMITS``, by the model; None if no log has its clocks.
        clocks: the clocks of each of them, see ``cost_model.Prediction``.
        note: that the winner could not be executed before it was chosen, and why; None otherwise.
        lost: the other candidates, fastest first.
    """

    kernel: str
    m: int
    n: int
    k: int
    scheme: str
    group_size: int
    bits: int
    dtype: str
    route: str
    provenance: str
    device: str | None
    time_us: float
    gb_s: float | None
    tflop_s: float | None
    of_copy: float | None
    of_matmul: float | None
    bound: str | None
    clocks: dict[str, float]
    note: str | None
    lost: tuple[Loss, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe_route(route: Route) -> str:
    """A route in words: "panel 16 MiB", or block_m x block_n x block_k, warps, stages and further settings."""
    if isinstance(route, Panel):
        return f"panel {route.mib} MiB"
    words = [
        f"{route.block_m}x{route.block_n}x{route.block_k}",
        f"{route.num_warps}w",
        f"{route.num_stages}s",
        f"split{route.split}" if route.split > 1 else "",
        "" if route.weight_left else "right",
        "sums" if route.scale_sums else "",
    ]
    return " ".join(word for word in words if word)


def rows(table: Table, log: Log, nominal: Ceilings) -> list[Row]:
    """A row for every entry of a table, sorted by kernel, dtype, scheme, shape and M.

    Args:
        table: the winners.
        log: the log of the same architecture.
        nominal: the ceilings for predictions.
    """
    listed = []
    for entry in table.values():
        record = log.records.get(entry.problem)
        if record is not None and record.device != entry.device:
            record = None  # it belongs to another run
        ceilings = nominal if entry.device is None else log.ceilings.get(entry.device)
        listed.append(_row(entry, record, ceilings))
    return sorted(listed, key=lambda row: (row.kernel, row.dtype, row.bits, row.scheme, row.n, row.k, row.m))


def _row(entry: Entry, record: Record | None, ceilings: Ceilings | None) -> Row:
    problem = entry.problem if record is None else record.problem
    if record is not None and record.measured_m is not None:
        problem = replace(problem, m=record.measured_m)
    dtype = DTYPE_NAMES[problem.dtype]
    gb_s = tflop_s = of_copy = of_matmul = None
    # A measured entry without its record is not rated, because its real shape is unknown. A shipped entry was predicted
    # for the bounds of its bucket.
    if record is not None or entry.provenance == "static":
        gb_s, tflop_s = bytes_moved(problem) / entry.time_us / 1e3, flops(problem) / entry.time_us / 1e6
        if ceilings is not None:
            of_copy = gb_s / ceilings.gb_s
            of_matmul = tflop_s / ceilings.tflop_s[dtype] if dtype in ceilings.tflop_s else None
    trials = [] if record is None else [trial for trial in record.trials if trial.route == entry.route]
    clocks = dict(trials[0].clocks) if trials else {}
    return Row(
        **asdict(problem) | {"dtype": dtype},
        route=describe_route(entry.route),
        provenance=entry.provenance,
        device=entry.device,
        time_us=entry.time_us,
        gb_s=gb_s,
        tflop_s=tflop_s,
        of_copy=of_copy,
        of_matmul=of_matmul,
        bound=bound_of(clocks) if clocks else None,
        clocks=clocks,
        note=trials[0].note if trials else None,
        lost=() if record is None else tuple(_losses(entry, record)),
    )


def _losses(entry: Entry, record: Record) -> Iterable[Loss]:
    """The candidates that lost: those with a time, fastest first, then those without.

    Predicted times are left out beside a measured winner.
    """
    timed, rest = [], []
    for trial in record.trials:
        time_us = trial.time_us if entry.provenance == "measured" else trial.predicted_us
        if trial.route == entry.route:
            continue
        if time_us is not None:
            loss = Loss(describe_route(trial.route), time_us, time_us / entry.time_us - 1, trial.reason)
            timed.append(loss)
        elif trial.reason is not None:
            rest.append(Loss(describe_route(trial.route), None, None, trial.reason))
    yield from sorted(timed, key=lambda loss: loss.time_us or 0.0)
    yield from rest


def nominal_ceilings(architecture: str) -> Ceilings:
    """Ceilings of the device that stands for an architecture in the model, by its data sheet."""
    device = NOMINAL[target_of(architecture)]
    rate = 2 * device.tensor_fma * device.sms * device.clock_ghz / 1e3
    names = ("float16", "bfloat16") if device.compute_capability >= 80 else ("float16",)
    return Ceilings(device.bandwidth, dict.fromkeys(names, rate))


def ceilings_of(rows: Iterable[Row], log: Log, nominal: Ceilings) -> dict[str, Ceilings]:
    """The ceilings that the rows are compared with, by device; those of predictions under "data sheet"."""
    rows = list(rows)
    by_device = {}
    for device in dict.fromkeys(row.device for row in rows):
        ceilings = nominal if device is None else log.ceilings.get(device)
        if ceilings is not None:
            names = {row.dtype for row in rows if row.device == device}
            rates = {name: rate for name, rate in ceilings.tflop_s.items() if name in names}
            by_device["data sheet" if device is None else device] = Ceilings(ceilings.gb_s, rates)
    return by_device


def draw(rows: Iterable[Row], ceilings: dict[str, Ceilings], title: str, path: Path) -> None:
    """Draws achieved bandwidth and rate over M as a PNG, with a line per kernel and shape, and dashed ceilings.

    Raises:
        ValueError: matplotlib is not installed, or no row has a rate.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install 'mebp-triton[plots]'") from None
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.gb_s is not None:
            word = "" if row.provenance == "measured" else ", predicted"
            lines.setdefault(f"{row.kernel} {row.n}x{row.k} {row.dtype}{word}", []).append(row)
    if not lines:
        raise ValueError("there is nothing to plot: no log beside the table names the shapes; run `mebp tune` first")
    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _draw_lines(left, lines, "gb_s", "GB/s: packed weights, scales, X and Y")
    _draw_lines(right, lines, "tflop_s", "TFLOP/s")
    for name, ceiling in ceilings.items():
        _draw_ceiling(left, ceiling.gb_s, f"{name}: copy")
        for dtype, rate in ceiling.tflop_s.items():
            _draw_ceiling(right, rate, f"{name}: {dtype}")
    left.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=120)


def _draw_lines(axes: Any, lines: dict[str, list[Row]], attribute: str, label: str) -> None:
    for name, points in lines.items():
        points = sorted(points, key=lambda row: row.m)
        style = {"linestyle": "-" if points[0].kernel == "matmul" else ":", "marker": "."}
        axes.plot([row.m for row in points], [getattr(row, attribute) for row in points], label=name, **style)
    axes.set(xlabel="M (tokens)", ylabel=label, yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


def _draw_ceiling(axes: Any, value: float, name: str) -> None:
    axes.axhline(value, color="black", linestyle="--", linewidth=0.8)
    axes.annotate(name, (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
