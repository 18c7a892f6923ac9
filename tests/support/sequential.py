"""Products in plain torch whose float32 sums take one term after another, as those of a compiled kernel do.

Torch's float32 products on a CPU add in many partial sums, whose error is two to five times smaller. A kernel is held
against sums of its own kind. Products of 16-bit floats are torch's own: their error is that of the last rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mebp_triton.kernels import reference
from mebp_triton.kernels.layout import Int4Weight


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, float32, each term by a multiplication and an addition that are rounded together."""
    total = torch.zeros(left.shape[0], right.shape[1], device=left.device)
    for column, row in zip(left.double().t(), right.double(), strict=True):
        total = (total + column[:, None] * row).float()
    return total


def matmul(
    x: Tensor, weight: Int4Weight, bias: Tensor | None = None, t: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """As ``reference.matmul``."""
    if x.dtype != torch.float32:
        return reference.matmul(x, weight, bias, t, b)
    left, right = x, reference.decode(weight).t()
    if t is not None and b is not None:
        left, right = torch.cat((left, t), 1), torch.cat((right, b.t()))
    y = product(left, right)
    return y if bias is None else y + bias


def matmul_dx(
    dys: Sequence[Tensor], weights: Sequence[Int4Weight], g: Tensor | None = None, a: Tensor | None = None
) -> Tensor:
    """As ``reference.matmul_dx``, summed over the members of a group."""
    left, right = torch.cat(list(dys), 1), torch.cat([reference.decode(weight, dys[0].dtype) for weight in weights])
    if g is not None and a is not None:
        left, right = torch.cat((left, g.to(left.dtype)), 1), torch.cat((right, a.to(right.dtype)))
    return product(left, right) if left.dtype == torch.float32 else left @ right
