"""The problems to tune for: shapes of layers times numbers of tokens, with one real problem for each bucket."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from mebp_triton.kernels.configs import TUNED, Problem
from mebp_triton.kernels.names import Scheme
from mebp_triton.kernels.tables import M_BUCKETS, bucket

Shape = tuple[int, int]
LARGEST = 1 << 24


def parse_shapes(text: str) -> list[Shape]:
    """``"4096x4096,11008x4096"`` as pairs (N, K). ValueError for anything else."""
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*[xX]\s*(\d{1,9})\s*", part, re.ASCII)
        if match is None or not all(1 <= int(size) <= LARGEST for size in match.groups()):
            raise ValueError(
                f"shapes must be pairs NxK of sizes 1..{LARGEST}, as in 4096x4096,11008x4096; got {part!r}"
            )
        shapes.append((int(match[1]), int(match[2])))
    return shapes


def parse_tokens(text: str) -> list[int]:
    """``"16,64"`` as numbers of tokens. ValueError for anything else, or beyond the largest bucket."""
    tokens = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*\d{1,9}\s*", part, re.ASCII) or not 1 <= int(part) <= M_BUCKETS[-1]:
            raise ValueError(f"m must be numbers of tokens 1..{M_BUCKETS[-1]}, as in 16,64; got {part!r}")
        tokens.append(int(part))
    return tokens


def with_groups(groups: Iterable[Sequence[Shape]]) -> list[Shape]:
    """The shapes of all layers, and of every group that shares an input, which is one launch with the sum of their N.

    Args:
        groups: (N, K) of the layers that read the same input; K is the same within a group.
    """
    shapes: dict[Shape, None] = {}
    for group in groups:
        shapes |= dict.fromkeys(group)
        shapes[sum(n for n, _ in group), group[0][1]] = None
    return list(shapes)


def problems(
    shapes: Iterable[Shape],
    tokens: Iterable[int] = M_BUCKETS,
    scheme: Scheme = "symmetric",
    group_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    bits: int = 4,
) -> list[Problem]:
    """Forward and dX of every shape and number of tokens. Of those in one bucket, the one with the most weights."""
    tokens = list(tokens)
    chosen: dict[Problem, Problem] = {}
    for n, k in shapes:
        for m in tokens:
            for kernel in TUNED:
                problem = Problem(kernel, m, n, k, scheme, group_size, dtype, bits)
                other = chosen.setdefault(bucket(problem), problem)
                if (n * k, m) > (other.n * other.k, other.m):
                    chosen[bucket(problem)] = problem
    return list(chosen.values())
