"""A transformers model directory, cut into shards of safetensors."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

SHARD_BYTES = 4 << 30


def shards(entries: dict[str, tuple[str, tuple[int, ...], int]]) -> list[list[str]]:
    """Names by file, which is at most ``SHARD_BYTES`` long unless one tensor is longer; wider dtypes first."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, (_, _, nbytes) in entries.items():
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return [sorted(names, key=lambda name: -entries[name][2] // max(1, prod(entries[name][1]))) for names in shards]


def rounded(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not piece.is_floating_point():
        return piece
    rounded = piece.to(dtype)
    if not rounded.isfinite().all():
        why = "is too large for float16: merge into bfloat16" if piece.isfinite().all() else "is not finite"
        raise ValueError(f"{name} {why}")
    return rounded
