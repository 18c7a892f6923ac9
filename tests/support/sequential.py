"""The products of ``reference`` with float32 sums as a compiled kernel has them (``accuracy.sequential_product``).

Products of 16-bit floats are torch's own: their error is that of the last rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mebp_triton.kernels import reference
from mebp_triton.kernels.accuracy import sequential_product
from mebp_triton.kernels.layout import Int4Weight


def matmul(
    x: Tensor, weight: Int4Weight, bias: Tensor | None = None, t: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """As ``reference.matmul``."""
    if x.dtype != torch.float32:
        return reference.matmul(x, weight, bias, t, b)
    left, right = x, reference.decode(weight).t()
    if t is not None and b is not None:
        left, right = torch.cat((left, t), 1), torch.cat((right, b.t()))
    y = sequential_product(left, right)
    return y if bias is None else y + bias


def matmul_dx(
    dys: Sequence[Tensor], weights: Sequence[Int4Weight], g: Tensor | None = None, a: Tensor | None = None
) -> Tensor:
    """As ``reference.matmul_dx``, summed over the members of a group."""
    left, right = torch.cat(list(dys), 1), torch.cat([reference.decode(weight, dys[0].dtype) for weight in weights])
    if g is not None and a is not None:
        left, right = torch.cat((left, g.to(left.dtype)), 1), torch.cat((right, a.to(right.dtype)))
    return sequential_product(left, right) if left.dtype == torch.float32 else left @ right
