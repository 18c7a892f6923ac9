"""Tuned configurations in files: one table per compute capability, shipped or the user's own.

A table is JSON: ``{"format": 1, "architecture": "sm_90", "entries": [...]}``. An entry names

- its problem: kernel, m, n, k (bounds of buckets), scheme, group_size, dtype, and bits where that is not 4;
- its ``route``: "tile" with a ``config``, or "panel" (decode a panel of the weight, and let the vendor's library
  multiply), with ``panel_mib`` where that is not 16;
- its ``provenance``: "measured" on a device, or "static" (compiled, and ranked by a model);
- ``time_us``, microseconds, measured or predicted; ``device``, null for static; and ``versions``.

A device is known by its compute capability, never by its name. A damaged table is ignored with a warning.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from .configs import PANEL, TUNED, Panel, Problem, TileConfig
from .names import FORMS, SCHEMES

FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
M_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SIZE_BUCKETS = tuple(1 << power for power in range(7, 19))
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SIZE_LIMIT = 1 << 26
# Largest values that a table may ask for, far more than any device has room for.
LARGEST = {"block_m": 512, "block_n": 512, "block_k": 512, "num_warps": 32, "num_stages": 8, "split": 64}

Provenance = Literal["measured", "static"]
Route = TileConfig | Panel


@dataclass(frozen=True)
class Entry:
    """One entry of a table.

    Attributes:
        problem: with m, n and k as bucket bounds.
        route: a configuration of tiles, or the size of panels.
        provenance: "measured" or "static".
        time_us: measured or predicted, microseconds.
        device: the name of the device that was measured; None for a static entry.
        versions: the versions of triton and torch.
    """

    problem: Problem
    route: Route
    provenance: Provenance
    time_us: float
    device: str | None
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        problem = problem_to_json(self.problem)
        return {
            **problem,
            **_route_to_json(self.route),
            "provenance": self.provenance,
            "time_us": self.time_us,
            "device": self.device,
            "versions": dict(self.versions),
        }


Table = dict[Problem, Entry]


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """A problem as JSON has it, which names the width of codes only where it is not 4."""
    value = asdict(problem) | {"dtype": DTYPE_NAMES[problem.dtype]}
    return {key: field for key, field in value.items() if (key, field) != ("bits", 4)}


def _route_to_json(route: Route) -> dict[str, Any]:
    if isinstance(route, TileConfig):
        return {"route": "tile", "config": asdict(route)}
    return {"route": "panel"} | ({} if route == PANEL else {"panel_mib": route.mib})


def check_form(item: Mapping[str, Any]) -> None:
    """ValueError where a problem's scheme, group size and bits in JSON are none that go together."""
    form = item["scheme"], item["group_size"], item["bits"]
    if any(type(field) not in (str, int) for field in form):
        raise ValueError(f"scheme, group_size and bits must be a name and two integers, got {form!r:.100}")
    if form not in FORMS:
        sizes = sorted({size for scheme, size, bits in FORMS if (scheme, bits) == (form[0], form[2])})
        if not sizes:
            raise ValueError(f"bits must be 4, or 8 without a codebook, got {form[2]!r:.100} for {form[0]!r:.40}")
        raise ValueError(f"group_size must be one of {tuple(sizes)}, got {form[1]!r:.100} for codes of {form[2]} bits")


def bucket_m(m: int) -> int:
    """The upper bound of m's bucket. Everything above the last bound is in the last bucket."""
    return next((bound for bound in M_BUCKETS if m <= bound), M_BUCKETS[-1])


def bucket_size(size: int) -> int:
    """The power of two that is nearest by ratio, within the buckets of N and K."""
    power = round(math.log2(max(size, 1)))
    return min(max(1 << power, SIZE_BUCKETS[0]), SIZE_BUCKETS[-1])


def bucket(problem: Problem) -> Problem:
    """The problem that stands for ``problem`` in a table."""
    return replace(problem, m=bucket_m(problem.m), n=bucket_size(problem.n), k=bucket_size(problem.k))


def table_to_json(architecture: str, entries: Iterable[Entry]) -> dict[str, Any]:
    order = sorted(entries, key=lambda entry: str(entry.to_json()))
    return {"format": FORMAT, "architecture": architecture, "entries": [entry.to_json() for entry in order]}


def parse_table(value: Any, architecture: str) -> Table:
    """A table from its JSON value. A ValueError of one line for anything that the module's docstring does not allow."""
    if not isinstance(value, dict) or value.keys() != {"format", "architecture", "entries"}:
        raise ValueError("a table has the keys format, architecture and entries")
    if value["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT}, got {value['format']!r:.100}")
    if value["architecture"] != architecture:
        raise ValueError(f"architecture must be {architecture!r}, got {value['architecture']!r}")
    if not isinstance(value["entries"], list):
        raise ValueError("entries must be a list")
    entries = [_parse_entry(item) for item in value["entries"]]
    table = {entry.problem: entry for entry in entries}
    if len(table) != len(entries):
        raise ValueError("two entries are for the same problem")
    return table


def read_strictly(path: Path) -> Any:
    """The value in a JSON file. ValueError for a key that stands twice, and for what is no JSON."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    return json.loads(path.read_bytes(), object_pairs_hook=once)


def is_time(value: Any) -> bool:
    """Whether ``value`` is a positive number that a float holds, as microseconds are."""
    return type(value) in (int, float) and 0 < value < 1e300


def _parse_entry(item: Any) -> Entry:
    names = {field.name for field in fields(Problem)}
    keys = names | {"route", "provenance", "time_us", "device", "versions"}
    if not isinstance(item, dict) or ({"bits": 4} | item).keys() - {"config", "panel_mib"} != keys:
        raise ValueError(
            f"an entry has the keys {', '.join(sorted(keys))}, config where its route is tile, and panel_mib at most "
            "where it is panel"
        )
    allowed: dict[str, Any] = {
        "kernel": TUNED,
        "scheme": SCHEMES,
        "dtype": tuple(DTYPES),
        "m": M_BUCKETS,
        "n": SIZE_BUCKETS,
        "k": SIZE_BUCKETS,
        "route": ("tile", "panel"),
        "provenance": ("measured", "static"),
    }
    for key, values in allowed.items():
        if type(item[key]) not in (str, int) or item[key] not in values:
            raise ValueError(f"{key} must be one of {values}, got {item[key]!r:.100}")
    item = {"bits": 4} | item
    check_form(item)
    time_us, versions, device = item["time_us"], item["versions"], item["device"]
    if not is_time(time_us):
        raise ValueError(f"time_us must be a positive number, got {time_us!r:.100}")
    if not isinstance(versions, dict) or not all(isinstance(text, str) for text in versions.values()):
        raise ValueError("versions must map names to version strings")
    if device is not None and not isinstance(device, str):
        raise ValueError(f"device must be a name or null, got {device!r}")
    problem = Problem(**{name: item[name] for name in names} | {"dtype": DTYPES[item["dtype"]]})
    return Entry(problem, _parse_route(item, problem), item["provenance"], float(time_us), device, versions)


def _parse_route(item: dict[str, Any], problem: Problem) -> Route:
    if item["route"] == "panel":
        if "config" in item:
            raise ValueError("an entry whose route is panel has no config")
        return Panel(item.get("panel_mib", PANEL.mib))
    if "panel_mib" in item:
        raise ValueError("an entry whose route is tile has no panel_mib")
    config = item.get("config")
    names = {field.name for field in fields(TileConfig)}
    if not isinstance(config, dict) or config.keys() != names:
        raise ValueError(f"config has the keys {', '.join(sorted(names))}")
    return parse_config(config, problem)


def parse_config(config: dict[str, Any], problem: Problem) -> TileConfig:
    """A configuration from JSON. ValueError if no device has room for it, or it does not suit the problem."""
    route = TileConfig(**config)
    for name, most in LARGEST.items():
        if getattr(route, name) > most:
            raise ValueError(f"{name} must be at most {most}, got {getattr(route, name)!r:.40}")
    if not route.suits(problem):
        raise ValueError("scale_sums is for matmul with the symmetric scheme, and sums within one group")
    return route


def read_table(path: Path, architecture: str) -> Table:
    """The table in a file; empty if there is no file, and with a warning if it cannot be used."""
    try:
        if not path.exists():
            return {}
        if path.parent != SHIPPED:
            check_private(path.parent)
            check_private(path)
        return read_named_table(path, architecture)
    except (ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"kernel table {path} is ignored: {reason}; remove it, or tune again", stacklevel=2)
        return {}


def read_named_table(path: Path, architecture: str) -> Table:
    """The table in a file that the user named. ValueError if it cannot be used."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > SIZE_LIMIT:
        raise ValueError("it is not a regular file of a table's size")
    return parse_table(read_strictly(path), architecture)


def check_private(place: Path) -> None:
    """Raises ValueError for a file or directory that somebody else may write to, since a launch would believe it."""
    status = place.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o002:
        raise ValueError(f"{place} belongs to somebody else, or everybody may write to it (chmod o-w)")


def user_table_path(architecture: str) -> Path:
    """The file of this user's own table: under ``$XDG_CACHE_HOME`` if that is absolute, else under ``~/.cache``."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache_home = named if named.is_absolute() else Path(os.path.expanduser("~/.cache"))
    return cache_home / "mebp-triton" / "tables" / f"{architecture}.json"


def load_tables(architecture: str) -> Table:
    """The shipped table, whose entries the user's own table replaces."""
    shipped = read_table(SHIPPED / f"{architecture}.json", architecture)
    return shipped | read_table(user_table_path(architecture), architecture)


class _ThreadState(threading.local):
    traced = ""  # the architecture for which this thread traces


_thread = _ThreadState()


@contextmanager
def traced_for(architecture: str) -> Iterator[None]:
    """While active, CPU tensors of this thread, which have no data, stand for those of a device of this architecture.

    This is how the planner counts what the launches of a run allocate: by the routes that the run will take.
    """
    before, _thread.traced = _thread.traced, architecture
    try:
        yield
    finally:
        _thread.traced = before


def architecture_of(device: torch.device) -> str:
    """The architecture that a device's tensors have or stand for: see ``device_architecture`` and ``traced_for``."""
    if device.type == "cpu" and not torch.compiler.is_compiling() and _thread.traced:
        return _thread.traced
    return device_architecture(device)


@cache
def device_architecture(device: torch.device) -> str:
    """The compute capability of a CUDA device, such as "sm_87"; the architecture's name on ROCm; "" elsewhere.

    If Triton's driver has been replaced by one that takes CPU tensors, the CPU has the capability that it names.
    """
    if device.type != "cuda":
        return _stand_in(device)
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _stand_in(device: torch.device) -> str:
    """The compute capability for which Triton's active driver compiles, if it takes tensors of this device."""
    if torch.compiler.is_compiling():
        return ""  # a compiler cannot trace a driver
    try:
        from triton.runtime.driver import driver

        active = driver.active
    except (ImportError, RuntimeError):  # there is no Triton, or no GPU and no other driver
        return ""
    return f"sm_{active.get_current_target().arch}" if active.get_active_torch_device().type == device.type else ""
