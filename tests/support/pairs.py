"""Combinations of test parameters without the full product."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

# Above so many combinations, those that are looked at are drawn instead of listed.
MOST_LISTED = 3_000
DRAWN = 30


def pairs(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations, one value of each factor, in which every two values of two factors meet at least once.

    Most faults need one or two settings to show, so such a set finds nearly what the full product finds. The set is
    found greedily and is the same in every process.
    """
    sizes = [range(len(factor)) for factor in factors]
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(range(len(sizes)), 2) for x in sizes[a] for y in sizes[b]
    }
    listed = list(itertools.product(*sizes)) if math.prod(map(len, factors)) <= MOST_LISTED else None
    pick, chosen = random.Random(0), []
    while missing:
        rows = listed or [drawn(sizes, missing, pick) for _ in range(DRAWN)]
        best = max(rows, key=lambda row: sum(pair in missing for pair in met(row)))
        chosen.append(best)
        missing.difference_update(met(best))
    return [tuple(factor[place] for factor, place in zip(factors, row, strict=True)) for row in chosen]


def met(row: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """The pairs of (factor, value) in a combination."""
    return itertools.combinations(enumerate(row), 2)


def drawn(sizes: Sequence[range], missing: set[Any], pick: random.Random) -> tuple[int, ...]:
    """A combination with a pair that is missing; its other values meet as many missing pairs as they can, in turn."""
    row = dict(min(missing))
    for place in pick.sample(range(len(sizes)), len(sizes)):
        if place not in row:
            values = pick.sample(sizes[place], len(sizes[place]))
            row[place] = max(
                values,
                key=lambda value: sum(tuple(sorted(((place, value), other))) in missing for other in row.items()),
            )
    return tuple(row[place] for place in range(len(sizes)))
