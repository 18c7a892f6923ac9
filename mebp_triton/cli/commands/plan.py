"""``mebp plan``: the predicted peak of a training run as a table, a picture, or JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mebp_triton.cli.console import answer
from mebp_triton.cli.flags import add_plot, add_quantization, add_settings, asked_form, plot_path
from mebp_triton.system.units import MIB
from mebp_triton.training.settings import CHOSEN, TrainConfig

if TYPE_CHECKING:
    from rich.table import Table

    from mebp_triton.training.plan.phases import Phase
    from mebp_triton.training.plan.planner import Plan


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a store, a model directory or a config.json")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of train's settings; flags win")
    add_plot(parser, "the memory in each phase of a step")
    add_settings(parser, TrainConfig)
    add_quantization(parser)


def run(arguments: argparse.Namespace) -> None:
    from mebp_triton.cli.inference import check_length, load_tokenizer, model_config
    from mebp_triton.cli.planning import planner_of, settings_of

    settings, given, plot = settings_of(arguments), Path(arguments.model), plot_path(arguments)
    config = model_config(given)
    check_length(given, settings.max_length)
    with contextlib.suppress(ValueError):
        load_tokenizer(given)  # so that the memory it leaves in use in a training process is in use here as well
    plan = planner_of(given, config, asked_form(arguments)).resolve(settings)
    if plot is not None:
        draw(plan, plot)
    answer(arguments, as_json(plan), table(plan))


def as_json(plan: Plan) -> dict[str, Any]:
    """The answer of ``mebp plan --json``: the peak, its components, and every phase of a step, in bytes."""

    def listed(phases: tuple[Phase, ...]) -> list[dict[str, Any]]:
        return [
            {"moment": phase.name, "total_bytes": phase.total, "components": dict(phase.components)} for phase in phases
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
        "experts_of_a_block_bytes": dataclasses.asdict(plan.experts),
        "chosen": {name: getattr(plan.settings, name) for name in CHOSEN},
        "host": listed(plan.host),
        "device": listed(plan.device),
        "settings": dataclasses.asdict(plan.settings),
    }


def table(plan: Plan) -> Table:
    """A row per component of memory and a column per phase of a step, in MiB."""
    from rich import box
    from rich.table import Table

    from mebp_triton.cli.planning import describe
    from mebp_triton.training.plan.phases import COMPONENTS

    top = plan.device_peak or plan.host_peak
    where = "on the device" if plan.device else "resident"
    title = f"{describe(plan)}\nMiB {where}; the highest is the {top.name}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    phases = plan.device or plan.host
    shown.add_column("", no_wrap=True)
    for phase in phases:
        longest = max(map(len, phase.name.split()))
        style = "bold" if phase is top else None
        shown.add_column(phase.name, justify="right", min_width=longest, style=style)
    for name in COMPONENTS:
        if any(phase.components[name] for phase in phases):
            shown.add_row(name, *(f"{phase.components[name] / MIB:.1f}" for phase in phases))
    shown.add_section()
    shown.add_row("total", *(f"{phase.total / MIB:.1f}" for phase in phases))
    if plan.device:
        shown.add_section()
        shown.add_row(f"host: {plan.host_peak.total / MIB:.1f}, without CUDA's own libraries")
    shown.caption = "files: " + ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in plan.files.items())
    if experts := plan.experts.every:
        parts = [f"{size / MIB:.1f}" for size in (plan.experts.expected, plan.experts.most, experts)]
        shown.caption += f"\nexperts of a block: {parts[0]} MiB expected to be used, at most {parts[1]} of {parts[2]}"
    return shown


def draw(plan: Plan, path: Path) -> None:
    """Draws a stacked bar for every phase of a step, as PNG."""
    from matplotlib.figure import Figure

    from mebp_triton.cli.planning import describe
    from mebp_triton.system import atomic
    from mebp_triton.system.units import parse_size
    from mebp_triton.training.plan.phases import COMPONENTS

    phases = plan.device or plan.host
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    names = [phase.name for phase in phases]
    left = [0.0] * len(phases)
    for place, component in enumerate(COMPONENTS):
        widths = [phase.components[component] / MIB for phase in phases]
        if any(widths):
            color = f"C{place}" if place < 10 else f"{0.3 + 0.2 * (place - 10):.1f}"  # a grey
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
