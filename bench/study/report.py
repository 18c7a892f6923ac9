"""Makes the study's tables and plots from the runs in ``bench/results/study``.

    python bench/study/report.py            # prints the tables of docs/selection.md, writes its plots

Differences are paired: a run is compared with the run of mode "full" of the same seed, which saw the same examples in
the same order. Intervals are 95 % intervals by Student's t over the seeds.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grid import COMMON, HALVES, STEPS, timed_as

RESULTS = Path(__file__).resolve().parent.parent / "results" / "study"
PLOTS = Path(__file__).resolve().parent.parent.parent / "docs" / "plots"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # Student's t, by the number of values


def runs(part: str) -> dict[str, dict[int, dict[str, Any]]]:
    """The runs of a part, by name and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((RESULTS / part).glob("*.json")):
        name, _, seed = path.stem.rpartition("-seed")
        found.setdefault(name, {})[int(seed)] = json.loads(path.read_text())
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def at(run: dict[str, Any], steps: float) -> tuple[float, float] | None:
    """Held-out loss and token accuracy after ``steps``, interpolated between evaluations; None if it had diverged."""
    evaluations = sorted((int(step), values) for step, values in run["evaluations"].items())
    if not evaluations or steps > evaluations[-1][0]:
        return None
    for (before, low), (after, high) in itertools.pairwise(evaluations):
        if before <= steps <= after:
            part = (steps - before) / (after - before)
            return low[0] + part * (high[0] - low[0]), low[1] + part * (high[1] - low[1])
    return (evaluations[0][1][0], evaluations[0][1][1]) if steps == evaluations[0][0] else None


@dataclass(frozen=True)
class Difference:
    """Differences from full after ``STEPS``, as mean and half of the interval's width.

    Attributes:
        loss: of held-out loss, in nats. accuracy: of token accuracy, in percent.
        steps: after which the row was evaluated. seeds, diverged: the numbers of runs.
    """

    loss: tuple[float, float]
    accuracy: tuple[float, float]
    steps: float
    seeds: int
    diverged: int


def compared(
    rows: dict[int, dict[str, Any]], full: dict[int, dict[str, Any]], relative: float | None = None
) -> Difference | None:
    """Compares a row with full after equal steps, or after equal time; None if all runs have diverged.

    A row that is slower than full has no evaluation so early, and one that is much faster none so late. The first or
    the last one counts then, and ``steps`` tells which.

    Args:
        relative: the time of a step in full's steps, for equal time.
    """
    losses, accuracies, diverged, steps = [], [], 0, float(STEPS)
    longest = max((int(step) for run in rows.values() for step in run["evaluations"]), default=STEPS)
    if relative is not None:
        steps = min(max(STEPS / relative, STEPS), longest)
    for seed, run in rows.items():
        mine, theirs = at(run, min(steps, max(map(int, run["evaluations"]), default=0))), full[seed]["evaluations"]
        if mine is None or "diverged" in run:
            diverged += 1
            continue
        losses.append(mine[0] - theirs[str(STEPS)][0])
        accuracies.append(100 * (mine[1] - theirs[str(STEPS)][1]))
    if not losses:
        return None
    return Difference(interval(losses), interval(accuracies), steps, len(losses), diverged)


def table(part: str, full: dict[int, dict[str, Any]], relative: dict[str, float]) -> list[str]:
    lines = ["| setting | step time / full's | loss, equal steps | loss, equal time | token accuracy, equal steps |"]
    lines.append("|---|---|---|---|---|")
    for name, rows in sorted(runs(part).items()):
        if name == "full":
            continue
        share = relative.get(timed_as(name))
        equal, timed = compared(rows, full), compared(rows, full, share)
        if equal is None or timed is None:
            lines.append(f"| {name} | diverged, all {len(rows)} | | | |")
            continue
        note = f", {equal.diverged} diverged" if equal.diverged else ""
        later = "" if share is None else f"{signed(timed.loss)} ({timed.steps:.0f} steps)"
        cells = [name + note, "" if share is None else f"{share:.2f}", signed(equal.loss), later]
        lines.append("| " + " | ".join([*cells, signed(equal.accuracy, 2) + " %"]) + " |")
    return lines


def rates() -> list[str]:
    """Held-out loss by learning rate, for one seed; COMMON's rate from the runs of the modes."""
    names = list(HALVES)
    found: dict[str, dict[float, float]] = {name: {} for name in names}
    for part in ("modes", "rates"):
        for name, rows in runs(part).items():
            base, _, rate = name.partition("-lr")
            value = at(rows[0], STEPS) if 0 in rows else None
            if base in found and value is not None:
                found[base][float(rate) if rate else COMMON["learning_rate"]] = value[0]
    tried = sorted({rate for values in found.values() for rate in values})
    lines = ["| setting | " + " | ".join(f"{rate:g}" for rate in tried) + " |", "|---" * (len(tried) + 1) + "|"]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(f"{found[name].get(rate, math.nan):.3f}" for rate in tried) + " |")
    return lines


def signed(value: tuple[float, float], digits: int = 3) -> str:
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
    """Cosines of biased gradients with the true ones, by ratio and schedule.

    A block has the true gradient if none above it is skipped: such blocks are counted, and left out of the medians.
    """
    data = json.loads((RESULTS / "bias.json").read_text())
    lines = ["| ratio | schedule | true | cosine of the others: median, lowest tenth | ratio of norms: median |"]
    lines.append("|---|---|---|---|---|")
    groups: dict[tuple[float, str], list[list[Any]]] = {}
    for row in data["rows"]:
        groups.setdefault((row[1], row[2]), []).append(row)
    for (ratio, schedule), rows in sorted(groups.items()):
        biased = [row for row in rows if row[4] < 1 - 1e-6]
        cosines = sorted(row[4] for row in biased)
        norms = statistics.median(row[5] for row in biased)
        low = cosines[len(cosines) // 10]
        true = f"{1 - len(biased) / len(rows):.0%}"
        lines.append(f"| {ratio:g} | {schedule} | {true} | {statistics.median(cosines):.2f}, {low:.2f} | {norms:.2f} |")
    return lines


def plots(full: dict[int, dict[str, Any]], relative: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    PLOTS.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, timed, title in zip(axes, (False, True), ("equal steps", "equal time"), strict=True):
        for mode, marker in (("identity", "o"), ("exact", "s"), ("freeze", "^")):
            points = []
            for name, rows in runs("modes").items():
                if not name.startswith(mode):
                    continue
                if (found := compared(rows, full, relative[name] if timed else None)) is not None:
                    points.append((float(name.split("-")[1]), *found.loss))
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
    relative = speed["relative"]
    full = runs("modes")["full"]
    print("full:", {seed: run["evaluations"][str(STEPS)] for seed, run in full.items()})
    for part in ("modes", "schedules", "baselines"):
        print(f"\n{part}\n" + "\n".join(table(part, full, relative)))
    print("\ninstructions\n" + "\n".join(table("instructions", runs("instructions")["full"], relative)))
    print("\nlearning rates, one seed\n" + "\n".join(rates()))
    print("\ndivergence\n" + "\n".join(divergence()))
    print("\nbias\n" + "\n".join(bias_summary()))
    print("\npeak MiB, each run a process of its own")
    for part in ("modes", "baselines"):
        for name, rows in runs(part).items():
            print(f"{name}: {statistics.median(run['peak_rss_bytes'] for run in rows.values()) / 2**20:.0f}")
    for granularity, taken in json.loads((RESULTS / "speed-256.json").read_text()).items():
        if isinstance(taken, dict) and "relative" in taken:
            print(f"256 tokens, {granularity}:", {name: f"{1 / x:.2f}x" for name, x in taken["relative"].items()})
    plots(full, relative)


if __name__ == "__main__":
    main()
