"""Sides of a comparison that take turns, alone or beside busy loops, and the spread of what they took.

A machine drifts while it measures: figures of one round belong together, and ratios are formed within a round.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

BUSY = "while True: pass"


@contextmanager
def busy_loops(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """While active, ``count`` processes compute without end, at normal priority."""
    loops = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(count)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


def beside(name: str, loops: int) -> str:
    """The name of a side's runs beside so many busy loops."""
    return f"{name} beside {loops}" if loops else name


def take_turns(
    sides: dict[str, Callable[[], dict[str, Any]]],
    rounds: int,
    loops: int = 0,
    check: Callable[[dict[str, list[dict[str, Any]]]], object] = lambda results: None,
) -> dict[str, list[dict[str, Any]]]:
    """Runs every side once in each round, and once more beside ``loops`` busy loops if there are any.

    The order is reversed from round to round, so that a steady drift favours no side. ``check`` sees what there is
    after every round.
    """
    loads = (0, loops) if loops else (0,)
    results: dict[str, list[dict[str, Any]]] = {beside(name, load): [] for name in sides for load in loads}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            for load in loads:
                with busy_loops(load):
                    results[beside(name, load)].append(sides[name]())
        check(results)
    return results


def spread(values: Iterable[float]) -> dict[str, Any]:
    """One value of each round, their median, and the smallest and largest."""
    rounds = list(values)
    return {"rounds": rounds, "median": statistics.median(rounds), "spread": [min(rounds), max(rounds)]}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """The spread of ``over / under`` within each round."""
    return spread(first / second for first, second in zip(over, under, strict=True))


def in_words(found: dict[str, Any]) -> str:
    """A median with its spread: "1.31 (1.28 to 1.35)"."""
    low, high = found["spread"]
    return f"{found['median']:.3g} ({low:.3g} to {high:.3g})"
