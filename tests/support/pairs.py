"""Combinations of test parameters without the full product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairs(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations, one value of each factor, in which every two values of two factors meet at least once.

    Most faults need one or two settings to show, so such a set finds nearly what the full product finds. The set is
    found greedily and is the same in every process.
    """
    rows = list(itertools.product(*(range(len(factor)) for factor in factors)))
    covers = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*covers.values())
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(covers[row] & missing))
        chosen.append(best)
        missing -= covers[best]
    return [tuple(factor[place] for factor, place in zip(factors, row, strict=True)) for row in chosen]
