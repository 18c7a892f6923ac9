"""Cases of the kernels over experts: weights in one storage, how they are launched, and their twins in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from mebp_triton.kernels import expert_products, reference
from mebp_triton.kernels.accuracy import sequential_product
from mebp_triton.kernels.configs import Kernel, TileConfig
from mebp_triton.kernels.expert_products import (
    expert_matmul_arguments,
    expert_matmul_dx_arguments,
    int4_expert_products_dx_triton,
    int4_expert_products_triton,
)
from mebp_triton.kernels.expert_table import ALIGNMENT, Experts
from mebp_triton.kernels.layout import Int4Weight

from .cases import Case, CaseKernel, Operands, laid_out
from .small_operations import Operation

# The size of LoRA's term beside the weight's own: small enough that an error of either shows.
LORA_SIZE = 0.06


def in_one_storage(weights: Sequence[Int4Weight], aligned: bool = True) -> list[Int4Weight]:
    """Copies weights into one storage, their strides kept, with bytes between them that decode to NaN or to -1.

    ``aligned``: whether tensors begin at multiples of ALIGNMENT; otherwise none does but by chance.
    """
    places, end = [], 0
    for weight in weights:
        for tensor in weight.tensors().values():
            last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            begin = -(-end // ALIGNMENT) * ALIGNMENT + (0 if aligned else tensor.element_size())
            places.append(begin)
            end = begin + (last + 1) * tensor.element_size()
    storage = torch.full((end + ALIGNMENT,), 0xFF, dtype=torch.uint8, device=weights[0].device)
    left = iter(places)

    def moved(tensor: Tensor) -> Tensor:
        begin, size = next(left), tensor.element_size()
        flat = storage[begin % size :]
        typed = flat[: flat.numel() // size * size].view(tensor.dtype)
        return typed.as_strided(tensor.shape, tensor.stride(), begin // size).copy_(tensor)

    return [replace(one, **{name: moved(tensor) for name, tensor in one.tensors().items()}) for one in weights]


class _Products:
    """Each expert's rows times its weight, or times its transpose; with LoRA's terms."""

    product = True

    def __init__(self, case: Case, operands: Operands) -> None:
        self.case, self.forward = case, case.kernel == "expert_matmul"
        rows, experts, rank = sum(case.sizes), len(case.sizes), case.rank
        weights = [operands.weight(case.m) for _ in case.sizes]
        self.weights = in_one_storage(weights, aligned=case.layout != "offset")
        inner, outer = (case.k, case.m) if self.forward else (case.m, case.k)
        self.given = operands.activations(rows, inner)
        self.low, self.high = None, None
        if rank:
            size = LORA_SIZE * math.sqrt(inner / rank)
            self.low = operands.activations(rows, rank)
            flat = laid_out(operands.numbers(experts * outer, rank) * size, case.layout)
            self.high = flat.unflatten(0, (experts, outer))
            if not self.forward:
                self.high = self.high.transpose(1, 2)

    def launch(self) -> list[Tensor]:
        launch = int4_expert_products_triton if self.forward else int4_expert_products_dx_triton
        operands = self.given, Experts(self.weights), self.case.sizes, self.low, self.high
        return [launch(*operands, self.case.config)]

    def by_torch(self, dtype: torch.dtype) -> list[Tensor]:
        """Rounds once, as a kernel does; float32 sums take one term after another."""
        sizes = list(self.case.sizes)
        lows = [None] * len(sizes) if self.low is None else self.low.split(sizes)
        parts = []
        for index, (weight, given, low) in enumerate(zip(self.weights, self.given.split(sizes), lows, strict=True)):
            matrix = reference.decode(weight, dtype)
            left, right = [given.to(dtype)], [matrix.t() if self.forward else matrix]
            if low is not None and self.high is not None:
                own = self.high[index].to(dtype)
                left, right = [*left, low.to(dtype)], [*right, own.t() if self.forward else own]
            a, b = torch.cat(left, 1), torch.cat(right)
            if dtype == torch.float32:
                parts.append(sequential_product(a, b))
            else:
                parts.append(a @ b if dtype == torch.float64 else (a.float() @ b.float()).to(dtype))
        return [torch.cat(parts)]


EXPERT_OPERATIONS: dict[CaseKernel, type[Operation]] = {"expert_matmul": _Products, "expert_matmul_dx": _Products}


def blank_expert_launch(
    kernel: Kernel, experts: Experts, tokens: int, config: TileConfig, rank: int = 16
) -> tuple[JITFunction, dict[str, Any]]:
    """A kernel over experts, "matmul" or "matmul_dx", and all arguments of a launch by name.

    The tensors are zeros in bfloat16. The weights may lie on the meta device.
    """
    (n, k), device = experts.head.shape, experts.head.device

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    table, x, y, low = zeros(1, 9, dtype=torch.int64), zeros(tokens, k), zeros(tokens, n), zeros(tokens, rank)
    if kernel == "matmul":
        arguments = expert_matmul_arguments(x, experts, table, low, zeros(experts.count, n, rank), y, config)
        return expert_products._expert_matmul_kernel, arguments
    arguments = expert_matmul_dx_arguments(y, experts, table, low, zeros(experts.count, rank, k), x, config)
    return expert_products._expert_matmul_dx_kernel, arguments
