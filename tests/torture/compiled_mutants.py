"""Plants errors into compiled kernels, one at a time, and sees whether the emulator or the accuracy rule notices them.

    python tests/torture/compiled_mutants.py --output bench/results/torture/compiled_mutants.json

An error is noticed if the emulator reports a fault, or if a result is refused by the rule of correctness, on any of the
kernel's problems (``compiled_kernels.py``). What nobody notices must have its reason in ``compiled_explanations.py``:
otherwise the exit code is 1.

The errors are drawn at random: as many of each group (barriers, guards, ...), and in each group as many of each kernel,
as there are.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from compiled_explanations import explanation  # noqa: E402
from compiled_kernels import MISSED, WRONG, Kernel, kernels, source_text  # noqa: E402
from ptx_mutations import GROUPS, Mutation  # noqa: E402
from results import counted_by, finish  # noqa: E402

OUTCOMES = ("fault", WRONG, MISSED)


@dataclass
class Planted:
    """An error that was tried, and how it showed."""

    kernel: Kernel
    mutation: Mutation
    found: str
    explanation: str | None = None
    outcome: str = field(init=False)

    def __post_init__(self) -> None:
        self.outcome = self.found if self.found in OUTCOMES else "fault"

    def record(self) -> dict[str, Any]:
        return {**described(self.kernel, self.mutation), "explanation": self.explanation}


def described(kernel: Kernel, mutation: Mutation) -> dict[str, Any]:
    """What an error changes: its kind, line, instruction, and line of Python with that line's text.

    "lines" says how many instructions are changed; the first one stands for them. "mask" is the line of Python that the
    instruction's predicate comes from, "kept" that of what stands there instead; "before" and "next" are the nearest
    instructions that have to do with shared memory; "whole" says that all sizes are multiples of 16.
    """
    one, mask = kernel.instructions[mutation.line], kernel.predicate_of(mutation.line)
    kept = kernel.predicate_of(mutation.line, mutation.changes[0][1])
    return {
        "kernel": str(kernel),
        "group": mutation.group,
        "kind": mutation.kind,
        "line": one.line,
        "lines": len(mutation.changes),
        "instruction": one.text,
        "becomes": mutation.changes[0][1],
        "source": one.source,
        "code": source_text(one.source),
        "mask": source_text(mask.source) if mask else "",
        "kept": source_text(kept.source) if kept else "",
        "whole": all(size % 16 == 0 for case in kernel.cases for size in (*case.sizes, case.k)),
        "before": kernel.neighbour(mutation.line, -1),
        "next": kernel.neighbour(mutation.line, 1),
    }


def drawn(every: Sequence[Kernel], count: int, seed: int) -> list[tuple[Kernel, Mutation]]:
    """``count`` errors: in equal shares by group, then by kernel, then by kind, as long as there are any."""
    rng = random.Random(seed)
    chosen: list[tuple[Kernel, Mutation]] = []
    left: dict[str, list[tuple[Kernel, list[list[Mutation]]]]] = {group: [] for group in GROUPS}
    for kernel in every:
        for group, pools in left.items():
            kinds: dict[str, list[Mutation]] = {}
            for mutation in kernel.mutations:
                if mutation.group == group:
                    kinds.setdefault(mutation.kind, []).append(mutation)
            for pool in kinds.values():
                rng.shuffle(pool)
            pools.append((kernel, list(kinds.values())))
    for pools in left.values():
        rng.shuffle(pools)
    while len(chosen) < count and any(left.values()):
        for group, pools in left.items():
            while pools and not any(pools[0][1]):
                pools.pop(0)
            if pools and len(chosen) < count:
                kernel, kinds = pools.pop(0)
                pool = rng.choice([pool for pool in kinds if pool])
                chosen.append((kernel, pool.pop()))
                pools.append((kernel, kinds))
            left[group] = pools
    return chosen


def summary(every: Sequence[Kernel], tried: Sequence[Planted], seed: int, seconds: float) -> dict[str, Any]:
    """Counts, each error that was not noticed, and how many of those have no explanation ("lost").

    "not_reached" has the number of instructions of each kernel that no problem executes.
    """
    missed = [one for one in tried if one.outcome == MISSED]
    return {
        "seed": seed,
        "seconds": round(seconds),
        "tried": len(tried),
        "noticed": len(tried) - len(missed),
        "missed": len(missed),
        "lost": sum(one.explanation is None for one in missed),
        "noticed_by": dict(sorted(Counter(one.found for one in tried if one.outcome != MISSED).items())),
        "groups": counted_by(tried, lambda one: one.mutation.group, OUTCOMES),
        "kinds": counted_by(tried, lambda one: one.mutation.kind, OUTCOMES),
        "not_reached": {str(kernel): len(kernel.instructions) - len(kernel.reached) for kernel in every},
        "kernels": counted_by(tried, lambda one: str(one.kernel), OUTCOMES),
        "misses": [one.record() for one in missed],
    }


def try_errors(every: Sequence[Kernel], count: int, seed: int) -> dict[str, Any]:
    started = time.monotonic()
    tried = []
    with warnings.catch_warnings():
        # Errors make infinite numbers, too.
        warnings.simplefilter("ignore", RuntimeWarning)
        for kernel, mutation in drawn(every, count, seed):
            one = Planted(kernel, mutation, kernel.outcome(mutation))
            if one.outcome == MISSED:
                one.explanation = explanation(described(kernel, mutation))
            tried.append(one)
    return summary(every, tried, seed, time.monotonic() - started)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="errors to plant (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", default="", metavar="REGEX", help="only those whose description matches")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args(arguments)
    chosen = [kernel for kernel in kernels() if re.search(options.kernels, str(kernel))]
    return finish(try_errors(chosen, options.count, options.seed), options.output)


if __name__ == "__main__":
    sys.exit(main())
