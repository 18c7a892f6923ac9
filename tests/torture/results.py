"""What ``bend`` and ``limits`` found: counts by outcome, and the file that they go to."""

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
    """How many were tried, and how many had each outcome."""
    table = Counter(item.outcome for item in items)
    return {"tried": len(items), **{outcome: table[outcome] for outcome in outcomes}}


def counted_by(items: Sequence[Item], key: Callable[[Item], str], outcomes: Sequence[str]) -> dict[str, dict[str, int]]:
    """``counted`` of those with the same key, by it."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return {name: counted(group, outcomes) for name, group in sorted(groups.items())}


def finish(value: dict[str, Any], output: Path | None) -> int:
    """Prints and writes the summary; the exit code: 1 where something was lost, or nothing tried."""
    if output:
        from mebp_triton.system import strict_json
        from mebp_triton.system.machine import environment

        output.parent.mkdir(parents=True, exist_ok=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        strict_json.write_json(output, {"commit": commit, "environment": environment(), **value})
    print(json.dumps(value, indent=1))
    if not value["tried"]:
        print("nothing was tried", file=sys.stderr)
    return int(value["lost"] > 0 or not value["tried"])
