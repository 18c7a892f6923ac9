"""``mebp plan``: the predicted peak of a training run as a table, a picture, or JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mebp_triton.cli.console import answer
from mebp_triton.cli.inference import check_length, load_tokenizer, model_config
from mebp_triton.store.manifest import MANIFEST
from mebp_triton.store.reader import Store
from mebp_triton.system import atomic
from mebp_triton.system.units import MIB, parse_size
from mebp_triton.training.plan.inventory import Inventory
from mebp_triton.training.plan.phases import COMPONENTS, Moment
from mebp_triton.training.plan.planner import Plan, Planner
from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.settings_file import read_config_file

CHOSEN: tuple[str, ...] = ("weights", "checkpoints", "optimizer_state", "recompute_granularity", "mlp_chunk_tokens")
CHOSEN += ("return_freed_memory",)


def settings_of(arguments: argparse.Namespace) -> TrainConfig:
    """From flags and ``--config``, not resolved: what was not set is None."""
    settings = read_config_file(arguments.config) if arguments.config else {}
    known = {item.name for item in dataclasses.fields(TrainConfig)}
    return TrainConfig(**(settings | {name: value for name, value in vars(arguments).items() if name in known}))


def planner_of(given: Path, config: Any, scheme: str | None, group_size: int | None) -> Planner:
    """For a store, or for the store that would be made of a model directory or a ``config.json``."""
    if (given / MANIFEST).exists():
        return Planner(Inventory.of_store(Store(given)), config)
    return Planner(Inventory.of_config(config, scheme, group_size), config)


def as_json(plan: Plan) -> dict[str, Any]:
    def moments(found: tuple[Moment, ...]) -> list[dict[str, Any]]:
        return [
            {"moment": moment.name, "total_bytes": moment.total, "components": dict(moment.components)}
            for moment in found
        ]

    device = plan.device_peak
    return {
        "planned_peak_bytes": plan.peak,
        "host_peak_bytes": plan.host_peak.total,
        "device_peak_bytes": None if device is None else device.total,
        "moment": (device or plan.host_peak).name,
        "components": dict((device or plan.host_peak).components),
        "memory_shared": plan.shared,
        "file_bytes": dict(plan.files),
        "chosen": {name: getattr(plan.settings, name) for name in CHOSEN},
        "host": moments(plan.host),
        "device": moments(plan.device),
        "settings": dataclasses.asdict(plan.settings),
    }


def describe(plan: Plan) -> str:
    """One line: what was chosen."""
    settings = plan.settings
    parts = [f"{name.replace('_', ' ')} {getattr(settings, name)}" for name in CHOSEN[:4]]
    if settings.mlp_chunk_tokens:
        parts.append(f"MLPs by {settings.mlp_chunk_tokens} tokens")
    if settings.return_freed_memory:
        parts.append("freed memory returned")
    return f"planned peak {plan.peak / MIB:.0f} MiB: {', '.join(parts)}"


def table(plan: Plan) -> Table:
    """Components down, the moments of a step across, in MiB."""
    top = plan.device_peak or plan.host_peak
    where = "on the device" if plan.device else "resident"
    title = f"{describe(plan)}\nMiB {where}; the highest is the {top.name}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    moments = plan.device or plan.host
    shown.add_column("", no_wrap=True)
    for moment in moments:
        longest = max(map(len, moment.name.split()))
        style = "bold" if moment is top else None
        shown.add_column(moment.name, justify="right", min_width=longest, style=style)
    for name in COMPONENTS:
        if any(moment.components[name] for moment in moments):
            shown.add_row(name, *(f"{moment.components[name] / MIB:.1f}" for moment in moments))
    shown.add_section()
    shown.add_row("total", *(f"{moment.total / MIB:.1f}" for moment in moments))
    if plan.device:
        shown.add_section()
        shown.add_row(f"host: {plan.host_peak.total / MIB:.1f}, without CUDA's own libraries")
    shown.caption = "files: " + ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in plan.files.items())
    return shown


def draw(plan: Plan, path: Path) -> None:
    """A stacked bar for every moment of a step, as PNG."""
    from matplotlib.figure import Figure

    moments = plan.device or plan.host
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    names = [moment.name for moment in moments]
    left = [0.0] * len(moments)
    for place, component in enumerate(COMPONENTS):
        widths = [moment.components[component] / MIB for moment in moments]
        if any(widths):
            color = f"C{place}" if place < 10 else ("0.4", "0.7")[place - 10]
            axes.barh(names, widths, left=left, label=component, color=color)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    if plan.settings.memory_budget is not None:
        budget = parse_size("memory_budget", plan.settings.memory_budget)
        axes.axvline(budget / MIB, color="black", linestyle=":", label="budget")
    axes.invert_yaxis()
    axes.set(xlabel="MiB on the device" if plan.device else "MiB resident", title=describe(plan))
    axes.title.set_fontsize(8)
    axes.legend(fontsize=8)
    with atomic.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def run(arguments: argparse.Namespace) -> None:
    settings, given = settings_of(arguments), Path(arguments.model)
    path = Path(arguments.plot) if arguments.plot else None
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"--plot {path} names no file in an existing directory")
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the package matplotlib, which is not installed")
    config = model_config(given)
    check_length(given, settings.max_length)
    with contextlib.suppress(ValueError):
        load_tokenizer(given)  # so that what it leaves behind in a training process is here as well
    plan = planner_of(given, config, arguments.scheme, arguments.group_size).resolve(settings)
    if path is not None:
        draw(plan, path)
    answer(arguments, as_json(plan), table(plan))
