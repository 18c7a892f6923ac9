"""Writes the tables that are shipped, ``kernels/tables/sm_*.json``: compiled, executed and ranked here without a GPU.

    python bench/ship_tables.py [--target 87 --target 90]    # processes with different targets may run side by side
    python bench/ship_tables.py --check

The tables are for the linear layers of the models in ``random_store.py``, and for their q/k/v and gate/up together.
They hold the symmetric scheme, groups of 64 and bfloat16, which stand in for the other schemes, group sizes and
float16. An entry that was measured on a device is kept.

``--check`` writes nothing. It compiles every shipped configuration for each scheme, group size and dtype that it stands
in for, for scales of two levels, and for groups of three weights, and executes it: 2,300 compilations, of which the
tests make some 50.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from random_store import MODELS

from mebp_triton.autotune.compile import report
from mebp_triton.autotune.rank import unfit
from mebp_triton.autotune.shipping import objection, static_table
from mebp_triton.kernels.configs import TUNED, Problem, TileConfig
from mebp_triton.kernels.tables import M_BUCKETS, bucket, read_table, table_to_json
from mebp_triton.system import atomic

TABLES = Path(__file__).parent.parent / "kernels" / "tables"
TARGETS = (80, 86, 87, 89, 90, 100, 120)


def shapes() -> set[tuple[int, int]]:
    """(N, K) of every launch."""
    found: set[tuple[int, int]] = set()
    for model in MODELS.values():
        hidden, inner = model["hidden_size"], model["intermediate_size"]
        head = model.get("head_dim", hidden // model["num_attention_heads"])
        q, kv = head * model["num_attention_heads"], head * model["num_key_value_heads"]
        found |= {(q, hidden), (kv, hidden), (q + 2 * kv, hidden), (hidden, q)}
        found |= {(inner, hidden), (2 * inner, hidden), (hidden, inner)}
    return found


def check(target: int) -> list[str]:
    """Shipped configurations that are not sound any more."""
    table = read_table(TABLES / f"sm_{target}.json", f"sm_{target}")
    tiles = {problem: entry.route for problem, entry in table.items() if isinstance(entry.route, TileConfig)}
    used = {(problem.kernel, config): problem for problem, config in tiles.items()}
    wrong = []
    for (kernel, config), problem in used.items():
        reason = unfit(problem, report(problem, config, target, members=3)) or objection(problem, config, target, print)
        print(f"sm_{target}: {kernel}, {config}: {reason or 'sound'}", flush=True)
        if reason is not None:
            wrong.append(f"sm_{target}: {kernel}, {config}: {reason}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="all by default")
    parser.add_argument("--check", action="store_true", help="compile what is shipped, and write nothing")
    arguments = parser.parse_args()
    if arguments.check:
        wrong = [line for target in arguments.target or TARGETS for line in check(target)]
        sys.exit("\n".join(wrong) or 0)
    sizes = sorted(shapes())
    problems = {bucket(Problem(kernel, m, n, k)) for kernel in TUNED for m in M_BUCKETS for n, k in sizes}
    order = sorted(problems, key=lambda problem: (problem.kernel, problem.m, problem.n, problem.k))
    for target in arguments.target or TARGETS:
        name = f"sm_{target}"
        path = TABLES / f"{name}.json"
        measured = [entry for entry in read_table(path, name).values() if entry.provenance == "measured"]
        start = time.monotonic()

        def say(line: str, name: str = name, start: float = start) -> None:
            print(f"{name} {time.monotonic() - start:4.0f} s: {line}", flush=True)

        kept = {entry.problem: entry for entry in (*static_table(order, target, say), *measured)}
        table = table_to_json(name, kept.values())
        lines = ",\n".join(json.dumps(entry) for entry in table.pop("entries"))
        text = json.dumps(table)[:-1] + ', "entries": [\n' + lines + "\n]}\n"
        TABLES.mkdir(exist_ok=True)
        atomic.write_bytes(path, text.encode())
        say(f"{len(kept)} entries in {path}")


if __name__ == "__main__":
    main()
