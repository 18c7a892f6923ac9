"""The tuning log beside a table: every candidate of every problem, its predicted and measured time, and why it lost.

It is JSON: ``{"format": 2, "architecture": "sm_87", "ceilings": {DEVICE: {...}}, "records": [...]}``. A record names
its problem (a real shape), the device and the versions of its measurement (null, and the compiler's versions, if
nothing was measured) and its trials, which are candidates in the order of the model's ranking. A trial's route is a
configuration, null for panels of 16 MiB, or ``{"panel_mib": 64}``. ``mebp tune`` on a device starts from a log that was
made elsewhere, and compiles and ranks nothing again. A log of format 1 is read as well: its trials have no clocks and
no notes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mebp_triton.kernels.configs import PANEL, TUNED, Panel, Problem, TileConfig
from mebp_triton.kernels.names import SCHEMES
from mebp_triton.kernels.tables import (
    DTYPES,
    Route,
    bucket,
    check_form,
    is_time,
    parse_config,
    problem_to_json,
    read_strictly,
)

from .ceilings import Ceilings
from .cost_model import LIMITS

FORMAT = 2
OLDER_FORMATS = (1,)
SIZE_LIMIT = 1 << 27


@dataclass(frozen=True)
class Trial:
    """One candidate of a problem.

    Attributes:
        route: a configuration of tiles, or the size of panels.
        predicted_us: the model's prediction; None if the candidate was dropped before, or never ranked.
        time_us: the measured median; None if it was not timed.
        samples_us: the samples that ``time_us`` is the median of.
        reason: why it was dropped, or not timed to the end; None otherwise.
        clocks: what ``cost_model.Prediction.clocks`` says; empty if the candidate was not ranked, or long ago.
        note: what is to be known about a candidate that was kept: that it could not be executed, and why.
    """

    route: Route
    predicted_us: float | None = None
    time_us: float | None = None
    samples_us: tuple[float, ...] = ()
    reason: str | None = None
    clocks: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class Record:
    """All candidates of one problem.

    Attributes:
        problem: a real shape, which stands for its bucket.
        trials: the candidates, best prediction first.
        device: the name of the device that measured them; None if nothing was measured.
        versions: the versions of triton and torch.
        measured_m: the M that was measured, less than the problem's if memory was short; None without a device.
    """

    problem: Problem
    trials: tuple[Trial, ...]
    device: str | None
    versions: Mapping[str, str]
    measured_m: int | None = None


@dataclass
class Log:
    """The log of one architecture: records by bucket, and ceilings by the name of the device."""

    architecture: str
    records: dict[Problem, Record] = field(default_factory=dict)
    ceilings: dict[str, Ceilings] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "architecture": self.architecture,
            "ceilings": {name: asdict(ceilings) for name, ceilings in self.ceilings.items()},
            "records": [_record_to_json(record) for record in self.records.values()],
        }


def _record_to_json(record: Record) -> dict[str, Any]:
    problem = problem_to_json(record.problem)
    trials = [
        asdict(trial) | {"route": _route_to_json(trial.route), "samples_us": list(trial.samples_us)}
        for trial in record.trials
    ]
    rest = {"device": record.device, "versions": dict(record.versions), "measured_m": record.measured_m}
    return {"problem": problem, "trials": trials, **rest}


def _route_to_json(route: Route) -> dict[str, Any] | None:
    if isinstance(route, TileConfig):
        return asdict(route)
    return None if route == PANEL else {"panel_mib": route.mib}


def parse_log(value: Any, architecture: str) -> Log:
    """A log from its JSON value. A ValueError of one line for anything that the module's docstring does not allow."""
    _check_keys(value, {"format", "architecture", "ceilings", "records"}, "a log")
    if value["format"] not in (FORMAT, *OLDER_FORMATS) or value["architecture"] != architecture:
        raise ValueError(
            f"wanted format {FORMAT} of {architecture}, got {value['format']!r} of {value['architecture']!r}"
        )
    if not isinstance(value["records"], list) or not isinstance(value["ceilings"], dict):
        raise ValueError("records must be a list, and ceilings an object")
    records = [_parse_record(item) for item in value["records"]]
    ceilings = {name: _parse_ceilings(item) for name, item in value["ceilings"].items()}
    return Log(architecture, {bucket(record.problem): record for record in records}, ceilings)


def _check_keys(value: Any, keys: set[str], what: str) -> None:
    if not isinstance(value, dict) or value.keys() != keys:
        raise ValueError(f"{what} has the keys {', '.join(sorted(keys))}")


def _parse_ceilings(item: Any) -> Ceilings:
    _check_keys(item, {"gb_s", "tflop_s"}, "ceilings")
    rates = item["tflop_s"]
    if not isinstance(rates, dict) or not all(is_time(number) for number in (item["gb_s"], *rates.values())):
        raise ValueError("ceilings are positive numbers")
    return Ceilings(item["gb_s"], rates)


def _parse_record(item: Any) -> Record:
    _check_keys(item, {field.name for field in fields(Record)}, "a record")
    if not isinstance(item["trials"], list):
        raise ValueError("trials must be a list")
    device, versions, measured_m = item["device"], item["versions"], item["measured_m"]
    if device is not None and not isinstance(device, str):
        raise ValueError(f"device must be a name or null, got {device!r}")
    if not isinstance(versions, dict) or not all(isinstance(text, str) for text in versions.values()):
        raise ValueError("versions must map names to version strings")
    if measured_m is not None and not _is_size(measured_m):
        raise ValueError(f"measured_m must be a positive integer or null, got {measured_m!r}")
    problem = _parse_problem(item["problem"])
    trials = tuple(_parse_trial(trial, problem) for trial in item["trials"])
    return Record(problem, trials, device, versions, measured_m)


def _parse_problem(item: Any) -> Problem:
    if isinstance(item, dict):
        item = {"bits": 4} | item
    _check_keys(item, {field.name for field in fields(Problem)}, "a problem")
    allowed: dict[str, Any] = {"kernel": TUNED, "scheme": SCHEMES, "dtype": tuple(DTYPES)}
    for key, values in allowed.items():
        if type(item[key]) not in (str, int) or item[key] not in values:
            raise ValueError(f"{key} must be one of {values}, got {item[key]!r}")
    check_form(item)
    if not all(_is_size(item[key]) for key in ("m", "n", "k")):
        raise ValueError("m, n and k must be positive integers")
    return Problem(**item | {"dtype": DTYPES[item["dtype"]]})


def _parse_trial(item: Any, problem: Problem) -> Trial:
    if isinstance(item, dict):
        item = {"clocks": {}, "note": None} | item
    _check_keys(item, {field.name for field in fields(Trial)}, "a trial")
    route, samples, clocks = _parse_route(item["route"], problem), item["samples_us"], item["clocks"]
    times = [item[key] for key in ("predicted_us", "time_us") if item[key] is not None]
    if not isinstance(samples, list) or not all(is_time(number) for number in [*times, *samples]):
        raise ValueError("times must be positive numbers")
    if not isinstance(clocks, dict) or not clocks.keys() <= set(LIMITS) or not all(map(_is_clocks, clocks.values())):
        raise ValueError(f"clocks must map some of {LIMITS} to numbers from 0 on, got {clocks!r:.100}")
    for key in ("reason", "note"):
        if item[key] is not None and not isinstance(item[key], str):
            raise ValueError(f"{key} must be a text or null, got {item[key]!r:.100}")
    return Trial(**item | {"route": route, "samples_us": tuple(samples)})


def _parse_route(route: Any, problem: Problem) -> Route:
    if route is None:
        return PANEL
    if isinstance(route, dict) and route.keys() == {"panel_mib"}:
        return Panel(route["panel_mib"])
    _check_keys(route, {field.name for field in fields(TileConfig)}, "a route")
    return parse_config(route, problem)


def _is_clocks(value: Any) -> bool:
    return value == 0 or is_time(value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 31


def log_path(table: Path) -> Path:
    """The file of a table's log, which lies beside the table."""
    return table.with_name(table.name + ".log")


def read_log(path: Path, architecture: str) -> Log:
    """The log in a file; empty if there is no file, and with a warning if it cannot be used."""
    if not path.exists():
        return Log(architecture)
    try:
        if not path.is_file() or path.stat().st_size > SIZE_LIMIT:
            raise ValueError("it is not a regular file of a log's size")
        return parse_log(read_strictly(path), architecture)
    except (ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"tuning log {path} is ignored: {reason}; remove it, or tune again", stacklevel=2)
        return Log(architecture)


def keep_measurements(old: Record | None, new: Record) -> Record:
    """``new``, or ``old`` with the new predictions if only ``old`` was measured."""
    if old is None or old.device is None or new.device is not None:
        return new
    predicted = {trial.route: trial for trial in new.trials}
    timed = {
        trial.route: replace(
            predicted[trial.route], time_us=trial.time_us, samples_us=trial.samples_us, reason=trial.reason
        )
        for trial in old.trials
        if trial.time_us is not None and trial.route in predicted
    }
    return replace(old, trials=tuple(timed.get(trial.route, trial) for trial in new.trials))
