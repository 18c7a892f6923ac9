"""Prints, as markdown, what the compiler makes of every shipped configuration; docs/kernels.md holds the output.

    python bench/kernel_table.py [--target 87]
    python bench/kernel_table.py --results bench/results/kernels-cpu.json

A main loop waits for its loads from global memory, and not for its copies (``cp.async``). The last columns are clocks
of one trip of the main loop, for one program on one multiprocessor: of the tensor cores at their nominal rate, of
shared memory (in brackets without bank conflicts), and of the schedulers; and the largest of the three as a multiple of
the first. A line below each table sums up that ratio over the table's entries.

With `--results` it prints instead what `bench/products.py` measured on a CPU: the time of one side as a multiple of
another's, the median over rounds with the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from turns import in_words, ratios

from mebp_triton.autotune.compile import report
from mebp_triton.autotune.cost_model import NOMINAL, trip_clocks
from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.execute import trip_counts
from mebp_triton.kernels.configs import TUNED, Problem, TileConfig
from mebp_triton.kernels.tables import SHIPPED, read_table

TARGETS = (80, 86, 87, 89, 90, 100, 120)
HEADINGS = (
    "kernel | M | tile M x N x K | warps | stages | | registers | spilled bytes | shared KiB | loads | copies"
    " | I2F | integer per weight"
    " | unit | tensor cores | shared memory | issue | bound"
)


def configurations(target: int) -> dict[tuple[str, TileConfig], list[Problem]]:
    """The shipped configurations of a target, and the buckets that take each."""
    taken: dict[tuple[str, TileConfig], list[Problem]] = {}
    for problem, entry in read_table(SHIPPED / f"sm_{target}.json", f"sm_{target}").items():
        if isinstance(entry.route, TileConfig):
            taken.setdefault((problem.kernel, entry.route), []).append(problem)
    return taken


def row(target: int, kernel: str, config: TileConfig, problems: list[Problem]) -> tuple[str, float | None]:
    """The line of a configuration, and how many times what the tensor cores take it takes; None if nobody counted."""
    problem = max(problems, key=lambda item: item.m)
    made = report(problem, config, target)
    try:
        counts = trip_counts(problem, config, target)
    except NotModelled:
        counts = None
    trip = trip_clocks(config, made, NOMINAL[target], counts)
    shared, ratio = "not executed", None
    if counts is not None:
        ratio = trip.bound / trip.tensor
        shared = f"{counts.wavefronts + counts.operands:.0f} ({counts.least_wavefronts + counts.operands:.0f})"
    more = [f"split {config.split}"] if config.split > 1 else []
    more += ["sums scaled"] if config.scale_sums else []
    more += ["weight right"] if kernel == "matmul_dx" and not config.weight_left else []
    tokens = sorted({item.m for item in problems})
    cells = [
        kernel,
        f"{tokens[0]} to {tokens[-1]}" if len(tokens) > 1 else str(tokens[0]),
        f"{config.block_m} x {config.block_n} x {config.block_k}",
        str(config.num_warps),
        str(config.num_stages),
        ", ".join(more),
        str(made.registers),
        str(made.spill_bytes),
        f"{made.shared_bytes / 1024:.1f}",
        str(made.loop.loads) if made.loop else "",
        str(made.loop.copies) if made.loop else "",
        str(made.conversions),
        "" if made.unpacking_per_weight is None else f"{made.unpacking_per_weight:.2f}",
        made.loop.tensor if made.loop else "",
        f"{trip.tensor:.0f}",
        shared,
        f"{trip.issue:.0f}",
        "" if ratio is None else f"{ratio:.2f}",
    ]
    return "| " + " | ".join(cells) + " |", ratio


def summary(kernel: str, found: list[tuple[Problem, float | None]]) -> str:
    """The ratios of a kernel's entries with 64 tokens and more, and with fewer."""
    parts = []
    for words, many in (("fewer than 64 tokens", False), ("64 tokens and more", True)):
        ratios = [ratio for problem, ratio in found if (problem.m >= 64) == many]
        known = [ratio for ratio in ratios if ratio is not None]
        text = f"{kernel}, {words}: {len(ratios)} entries with a tile"
        if known:
            text += f", bound {min(known):.2f} to {max(known):.2f}, median {median(known):.2f}"
        parts.append(text)
    return "; ".join(parts)


RATIOS = (
    ("ours", "torch"),
    ("ours", "plain"),
    ("ours_nf4", "bitsandbytes"),
    ("ours_nf4", "bitsandbytes_scalar"),
)


def ratio_table(record: dict[str, Any]) -> list[str]:
    """Lines of one table: the time of the first side over that of the second, for every problem measured."""
    samples: dict[tuple[str, str], dict[str, list[float]]] = {}
    for entry in record["benchmarks"]:
        problem = samples.setdefault((entry["group"], entry["problem"]), {})
        problem[entry["side"]] = entry["samples_seconds"]
    pairs = [pair for pair in RATIOS if any(set(pair) <= set(sides) for sides in samples.values())]
    headings = ["", "problem", *(f"{over} / {under}" for over, under in pairs)]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for (group, problem), sides in samples.items():
        cells = [in_words(ratios(sides[a], sides[b])) if {a, b} <= set(sides) else "" for a, b in pairs]
        lines.append("| " + " | ".join((group, problem, *cells)) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="all by default")
    parser.add_argument("--results", type=Path, help="JSON file of bench/products.py")
    arguments = parser.parse_args()
    if arguments.results:
        print("\n".join(ratio_table(json.loads(arguments.results.read_text()))))
        return
    for target in arguments.target or TARGETS:
        print(f"\n### sm_{target}\n\n| {HEADINGS} |\n|" + "---|" * (HEADINGS.count("|") + 1))
        found: dict[str, list[tuple[Problem, float | None]]] = {kernel: [] for kernel in TUNED}
        for (kernel, config), problems in sorted(configurations(target).items(), key=str):
            line, ratio = row(target, kernel, config, problems)
            print(line, flush=True)
            found[kernel] += [(problem, ratio) for problem in problems]
        print("\n" + ". ".join(summary(kernel, found[kernel]) for kernel in TUNED) + ".")


if __name__ == "__main__":
    main()
