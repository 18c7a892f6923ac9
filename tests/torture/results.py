"""Counts by outcome, and the file that the results of a torture script go to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Tried(Protocol):
    outcome: str


Item = TypeVar("Item", bound=Tried)


def counted(items: Sequence[Item], outcomes: Sequence[str]) -> dict[str, int]:
    """The number of items under "tried", and the number with each outcome."""
    table = Counter(item.outcome for item in items)
    return {"tried": len(items), **{outcome: table[outcome] for outcome in outcomes}}


def counted_by(items: Sequence[Item], key: Callable[[Item], str], outcomes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Groups the items by ``key`` and counts each group as ``counted`` does."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return {name: counted(group, outcomes) for name, group in sorted(groups.items())}


def commit() -> str:
    """The commit of the working directory; "" where there is none."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def finish(value: dict[str, Any], output: Path | None) -> int:
    """Prints the summary and writes it to ``output``. The exit code is 1 if anything was lost or nothing was tried."""
    if output:
        from mebp_triton.system import strict_json
        from mebp_triton.system.machine import environment

        output.parent.mkdir(parents=True, exist_ok=True)
        strict_json.write_json(output, {"commit": commit(), "environment": environment(), **value})
    print(json.dumps(value, indent=1))
    if not value["tried"]:
        print("nothing was tried", file=sys.stderr)
    return int(value["lost"] > 0 or not value["tried"])
