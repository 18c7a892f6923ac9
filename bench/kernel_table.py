"""Prints, as markdown, what the compiler makes of every shipped configuration; docs/kernels.md holds the output.

    python bench/kernel_table.py [--target 87]

"Before" is the same kernel with codes converted by the language (its plain twin), "after" with inline assembly.
"""

from __future__ import annotations

import argparse
from unittest import mock

from mebp_triton.autotune.compile import StaticReport, report
from mebp_triton.kernels import matmul, matmul_dx
from mebp_triton.kernels.configs import Problem, TileConfig
from mebp_triton.kernels.tables import SHIPPED, read_table

TARGETS = (80, 86, 87, 89, 90, 100, 120)


def configurations(target: int) -> dict[tuple[str, TileConfig], list[Problem]]:
    """The shipped configurations of a target, and the buckets that take each."""
    taken: dict[tuple[str, TileConfig], list[Problem]] = {}
    for problem, entry in read_table(SHIPPED / f"sm_{target}.json", f"sm_{target}").items():
        if entry.route is not None:
            taken.setdefault((problem.kernel, entry.route), []).append(problem)
    return taken


def plain(problem: Problem, config: TileConfig, target: int) -> StaticReport:
    """Compiled without inline assembly."""
    patches = [mock.patch.object(module, "runs_compiled", lambda kernel: False) for module in (matmul, matmul_dx)]
    with patches[0], patches[1]:
        return report(problem, config, target)


def row(target: int, kernel: str, config: TileConfig, problems: list[Problem]) -> str:
    problem = max(problems, key=lambda item: item.m)
    before, after = plain(problem, config, target), report(problem, config, target)
    tile = f"{config.block_m} x {config.block_n} x {config.block_k}"
    more = [f"split {config.split}"] if config.split > 1 else []
    more += ["sums scaled"] if config.scale_sums else []
    more += ["weight right"] if kernel == "matmul_dx" and not config.weight_left else []
    tokens = sorted({item.m for item in problems})
    cells = [
        kernel,
        f"{tokens[0]} to {tokens[-1]}" if len(tokens) > 1 else str(tokens[0]),
        tile,
        str(config.num_warps),
        str(config.num_stages),
        ", ".join(more),
        str(after.registers),
        str(after.spill_bytes),
        f"{after.shared_bytes / 1024:.1f}",
        f"{before.registers} regs, {before.spill_bytes} spilled, {before.conversions} I2F, {_per_weight(before)}",
        f"{after.conversions} I2F, {_per_weight(after)}",
        after.loop.tensor if after.loop else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _per_weight(made: StaticReport) -> str:
    return "" if made.unpacking_per_weight is None else f"{made.unpacking_per_weight:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="all by default")
    heads = "kernel | M | tile M x N x K | warps | stages | | registers | spilled bytes | shared KiB"
    heads += " | before | after | unit"
    for target in parser.parse_args().target or TARGETS:
        print(f"\n### sm_{target}\n\n| {heads} |\n|" + "---|" * (heads.count("|") + 1))
        for (kernel, config), problems in sorted(configurations(target).items(), key=str):
            print(row(target, kernel, config, problems), flush=True)


if __name__ == "__main__":
    main()
