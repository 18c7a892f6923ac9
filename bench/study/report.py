"""Tables and plots of the study, from the runs in ``bench/results/study``.

    python bench/study/report.py            # prints the tables of docs/selection.md, writes its plots

Differences are paired: a run is compared with the run of mode "full" of the same seed, which saw the same examples in
the same order. Intervals are 95 % of Student's t over the seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grid import STEPS

RESULTS = Path(__file__).resolve().parent.parent / "results" / "study"
PLOTS = Path(__file__).resolve().parent.parent.parent / "docs" / "plots"
PARTS = ("modes", "schedules", "baselines")  # all compared with full's runs of "modes"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # by the number of values


def runs(part: str) -> dict[str, dict[int, dict[str, Any]]]:
    """By name and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((RESULTS / part).glob("*.json")):
        name, _, seed = path.stem.rpartition("-seed")
        found.setdefault(name, {})[int(seed)] = json.loads(path.read_text())
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the width of its 95 % interval."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def compared(
    rows: dict[int, dict[str, Any]], full: dict[int, dict[str, Any]], last: bool
) -> tuple[tuple[float, float], tuple[float, float], int] | None:
    """Differences of held-out loss and token accuracy from full's, after equal steps or (``last``) in equal time."""
    losses, accuracies, steps = [], [], STEPS
    for seed, run in rows.items():
        if seed not in full or not run["evaluations"]:
            continue
        steps = max(map(int, run["evaluations"])) if last else STEPS
        mine, theirs = run["evaluations"][str(steps)], full[seed]["evaluations"][str(STEPS)]
        losses.append(mine[0] - theirs[0])
        accuracies.append(100 * (mine[1] - theirs[1]))
    return (interval(losses), interval(accuracies), steps) if losses else None


def mode_and_ratio(name: str) -> str:
    return "-".join(name.split("-")[:2])


def table(part: str, full: dict[int, dict[str, Any]], speed: dict[str, Any]) -> list[str]:
    lines = ["| setting | step time / full's | loss, equal steps | loss, equal time | token accuracy, equal steps |"]
    lines.append("|---|---|---|---|---|")
    for name, rows in sorted(runs(part).items()):
        equal, timed = compared(rows, full, False), compared(rows, full, True)
        if equal is None or timed is None or name == "full":
            continue
        key = next((row for row in speed["fastest"] if mode_and_ratio(row) == mode_and_ratio(name)), "")
        share = f"{speed['median'][key] / speed['median']['full']:.2f}" if key else ""
        cells = [name, share, signed(equal[0]), f"{signed(timed[0])} ({timed[2]} steps)", signed(equal[1], 2) + " %"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def signed(value: tuple[float, float], digits: int = 4) -> str:
    return f"{value[0]:+.{digits}f} ± {value[1]:.{digits}f}"


def divergence() -> list[str]:
    lines = ["| setting | loss at first, last five steps | held-out loss |", "|---|---|---|"]
    for name, rows in sorted(runs("divergence").items()):
        for run in rows.values():
            if "diverged" in run:
                lines.append(f"| {name} | diverged: {run['diverged'].split(':')[0]} | |")
                continue
            first, last = statistics.fmean(run["losses"][:5]), statistics.fmean(run["losses"][-5:])
            held_out = next(reversed(run["evaluations"].values()))[0]
            lines.append(f"| {name} | {first:.3f}, {last:.3f} | {held_out:.3f} |")
    return lines


def bias_summary() -> list[str]:
    data = json.loads((RESULTS / "bias.json").read_text())
    lines = ["| ratio | schedule | cosine: median, lowest tenth | ratio of norms: median |", "|---|---|---|---|"]
    groups: dict[tuple[float, str], list[list[Any]]] = {}
    for row in data["rows"]:
        groups.setdefault((row[1], row[2]), []).append(row)
    for (ratio, schedule), rows in sorted(groups.items()):
        cosines = sorted(row[4] for row in rows)
        norms = statistics.median(row[5] for row in rows)
        low = cosines[len(cosines) // 10]
        lines.append(f"| {ratio:g} | {schedule} | {statistics.median(cosines):.2f}, {low:.2f} | {norms:.2f} |")
    return lines


def plots(full: dict[int, dict[str, Any]], speed: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    PLOTS.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, last, title in zip(axes, (False, True), ("equal steps", "equal time"), strict=True):
        for mode, marker in (("identity", "o"), ("exact", "s"), ("freeze", "^")):
            points = []
            for name, rows in runs("modes").items():
                if name.startswith(mode) and (found := compared(rows, full, last)) is not None:
                    points.append((float(name.split("-")[1]), *found[0]))
            points.sort()
            if points:
                ratios, means, widths = zip(*points, strict=True)
                axis.errorbar(ratios, means, widths, marker=marker, capsize=3, label=mode)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="part of the blocks that a step trains")
        axis.legend()
    axes[0].set_ylabel("held-out loss, less full's")
    figure.tight_layout()
    figure.savefig(PLOTS / "selection-loss.png", dpi=110)
    if (RESULTS / "bias.json").exists():
        data = json.loads((RESULTS / "bias.json").read_text())["rows"]
        figure, axis = plt.subplots(figsize=(7, 4))
        for ratio in sorted({row[1] for row in data}):
            blocks = sorted({row[3] for row in data})
            medians = [
                statistics.median(row[4] for row in data if row[1] == ratio and row[2] == "cyclic" and row[3] == block)
                for block in blocks
            ]
            axis.plot(blocks, medians, marker=".", label=f"ratio {ratio:g}")
        axis.set(xlabel="block", ylabel="cosine with the true gradient", title="identity, cyclic windows")
        axis.legend()
        figure.tight_layout()
        figure.savefig(PLOTS / "selection-bias.png", dpi=110)


def main() -> None:
    speed = json.loads((RESULTS / "speed.json").read_text())
    modes = runs("modes")
    full = modes["full"]
    print("full:", {seed: run["evaluations"][str(STEPS)] for seed, run in full.items()})
    for part in PARTS:
        print(f"\n{part}\n" + "\n".join(table(part, full, speed)))
    instructions = runs("instructions")
    if "full" in instructions:
        print("\ninstructions\n" + "\n".join(table("instructions", instructions["full"], speed)))
    print("\ndivergence\n" + "\n".join(divergence()))
    if (RESULTS / "bias.json").exists():
        print("\nbias\n" + "\n".join(bias_summary()))
    print("\nseconds a step, two threads; peak MiB of whole runs in a process each")
    peaks = {
        name: [run["peak_rss_bytes"] for run in rows.values()] for part in PARTS for name, rows in runs(part).items()
    }
    for name, seconds in speed["fastest"].items():
        peak = f"{statistics.median(peaks[name]) / 2**20:.0f} MiB" if name in peaks else ""
        print(f"{name}: {seconds:.3f} s, {peak}")
    plots(full, speed)


if __name__ == "__main__":
    main()
