"""The plots of a run: its loss, the memory over one step, and the time per block."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mebp_triton.system import atomic
from mebp_triton.system.memory import MemoryWatch
from mebp_triton.system.units import MIB


def draw_plots(
    directory: Path,
    metrics: list[dict[str, Any]],
    watch: MemoryWatch,
    evaluations: Sequence[dict[str, Any]] = (),
) -> list[str]:
    """Draws loss over steps, memory over one step, and time per block, as PNG files in ``directory``.

    Args:
        metrics: the lines of ``metrics.jsonl`` of steps.
        watch: has the timeline of one step, or none.
        evaluations: its other lines, which are drawn beside the loss.

    Returns:
        The names of the files; none without matplotlib or metrics.
    """
    if importlib.util.find_spec("matplotlib") is None or not metrics:
        return []
    from matplotlib.figure import Figure

    drawn = []

    def save(figure: Figure, name: str) -> None:
        with atomic.atomic_path(directory / name) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        drawn.append(name)

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [row["step"] + 1 for row in metrics],
        [math.nan if (loss := row["loss"]) is None else loss for row in metrics],
        linewidth=1.2,
        label="training",
    )
    if evaluations:
        steps, losses = zip(*((row["step"] + 1, row["eval_loss"]) for row in evaluations), strict=True)
        axes.plot(steps, losses, marker="o", markersize=3, label="evaluation")
        axes.legend()
    axes.set(xlabel="step", ylabel="loss (nats per token)" if evaluations else "training loss (nats per token)")
    axes.set_title("Loss")
    axes.grid(alpha=0.3)
    save(figure, "loss.png")
    if watch.timeline:
        save(_memory_figure(watch), "memory.png")
        save(_time_figure(watch), "time_per_block.png")
    return drawn


def _memory_figure(watch: MemoryWatch) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    start = watch.timeline[0][0]
    seconds = [entry[0] - start for entry in watch.timeline]
    anonymous = [entry[3] / MIB for entry in watch.timeline]
    file_backed = [entry[4] / MIB for entry in watch.timeline]
    axes.stackplot(seconds, anonymous, file_backed, labels=["anonymous", "file-backed"], alpha=0.7)
    if watch.device.type == "cuda":
        axes.plot(seconds, [entry[5] / MIB for entry in watch.timeline], color="black", label="device")
    turn = next((entry[0] - start for entry in watch.timeline if entry[1] == "backward"), None)
    if turn is not None:
        axes.axvline(turn, color="grey", linestyle=":", label="first block backward")
    axes.set(xlabel="seconds", ylabel="MiB", title="Memory over a step", ylim=(0, None))
    axes.legend(loc="lower right")
    return figure


def _time_figure(watch: MemoryWatch) -> Any:
    from matplotlib.figure import Figure

    spent: dict[str, dict[int, float]] = {"forward": {}, "backward": {}}
    for previous, entry in zip(watch.timeline, watch.timeline[1:], strict=False):
        if previous[1] == entry[1]:  # between two blocks of one pass
            spent[entry[1]][entry[2]] = (entry[0] - previous[0]) * 1000
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for shift, (event, times) in enumerate(spent.items()):
        axes.bar([index + 0.4 * shift for index in times], list(times.values()), width=0.4, label=event)
    axes.set(xlabel="block", ylabel="milliseconds", title="Time per block")
    axes.legend()
    return figure
