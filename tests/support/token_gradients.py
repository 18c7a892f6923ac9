"""Launches of the kernel of LoRA's gradients, judged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels import accuracy
from mebp_triton.kernels.lora_gradients import lora_gradients_triton

# (M, N of each member, R): nothing divides anything; smaller than a tile; more ranks than a tile has.
SIZES = ((130, (70, 1, 33), 5), (1, (5,), 1), (64, (32, 64), 16), (37, (40, 20), 70), (0, (9, 3), 4))
GUARD = 16


def poisoned(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """A matrix of NaN, and the memory that it lies in, 7 around it."""
    memory = torch.full((rows + 2, columns + GUARD), 7.0, dtype=dtype, device=device)
    matrix = memory[1 : rows + 1, :columns]
    matrix.fill_(float("nan"))
    return matrix, memory


def verdicts(
    sizes: tuple[int, tuple[int, ...], int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    transposed: bool = False,
    on: str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Launches on views with strides, and judges each member; the memory around the outputs must stay."""
    m, columns, rank = sizes
    device = torch.device(on)
    generator = torch.Generator(device).manual_seed(m)

    def random(*shape: int) -> Tensor:
        return accuracy.normal(*shape, dtype=dtype, device=device, generator=generator)

    lefts = [random(n + 3, m).t()[:, 3:] if place == 1 else random(m, n + 3)[:, 3:] for place, n in enumerate(columns)]
    rights = random(m, len(columns) * rank).split(rank, dim=1)
    memories = [poisoned(*((rank, n) if transposed else (n, rank)), out_dtype, device) for n in columns]
    outs = [matrix.t() if transposed else matrix for matrix, _ in memories]
    lora_gradients_triton(lefts, rights, outs)
    for (matrix, memory), out in zip(memories, outs, strict=True):
        kept, matrix = matrix.clone(), matrix.fill_(7.0)
        assert (memory == 7.0).all(), "wrote outside of its output"
        out.copy_(kept.t() if transposed else kept)
    for left, right, out in zip(lefts, rights, outs, strict=True):
        # A kernel adds one token after another, and torch in many partial sums.
        same = accuracy.sequential_product(left.float().t(), right.float()).to(out_dtype)
        yield accuracy.judge(out, same, left.double().t() @ right.double(), product=True)
