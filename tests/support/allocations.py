"""What happens while something runs: the tensors that are made, and the products with int4 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """While active, notes the number of elements of the largest tensor that is made. Views do not count.

    What a custom operation makes inside is not seen, only its outputs.
    """

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in () if func.is_view else output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return output


class Products(TorchDispatchMode):
    """While active, notes each product with an int4 weight.

    Attributes:
        rows: for each product ``X·Wᵀ``, the rows of X. Layers that are computed together count one by one.
        transposed: for each product ``dY·W`` of a layer alone, the rows of dY.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.transposed: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mebp_triton.int4_matmul.default:
            self.rows.append(args[0].shape[0])
        if func is torch.ops.mebp_triton.int4_matmul_dx.default:
            self.transposed.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))
