"""Cases of the kernels that take no int4 weight: how they are launched, and their twins in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mebp_triton.kernels import reference
from mebp_triton.kernels.accuracy import sequential_product
from mebp_triton.kernels.gated_activation import gated_activation_backward_triton, gated_activation_triton
from mebp_triton.kernels.lora_gradients import lora_gradients_triton
from mebp_triton.kernels.rms_norm import rms_norm_dx_triton, rms_norm_triton
from mebp_triton.kernels.rope import rope_triton

from .cases import Case, CaseKernel, Operands

EPS = 1e-5


class Operation(Protocol):
    """Operands of a case, and its results by the kernels and by torch.

    Attributes:
        product: whether each result is one matrix product.
    """

    product: bool

    def __init__(self, case: Case, operands: Operands) -> None: ...

    def launch(self) -> list[Tensor]:
        """The results by the kernels, forward and backward."""
        ...

    def by_torch(self, dtype: torch.dtype) -> list[Tensor]:
        """The same results by torch, of operands in another dtype."""
        ...


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], given: Tensor) -> list[Tensor]:
    """A function's result, and the gradients of its inputs for a gradient of the result."""
    leaves = [one.detach().clone().requires_grad_(True) for one in inputs]
    with torch.enable_grad():
        result = function(*leaves)
        return [result.detach(), *torch.autograd.grad(result, leaves, given)]


class _RMSNorm:
    product = False

    def __init__(self, case: Case, operands: Operands) -> None:
        self.style = case.style
        self.x, self.dy = operands.activations(case.m, case.k), operands.activations(case.m, case.k)
        self.weight = operands.numbers(case.k)

    def launch(self) -> list[Tensor]:
        style: reference.NormStyle = self.style  # type: ignore[assignment]
        y = rms_norm_triton(self.x, self.weight, EPS, style)
        return [y, rms_norm_dx_triton(self.dy, self.x, self.weight, EPS, style)]

    def by_torch(self, dtype: torch.dtype) -> list[Tensor]:
        style: reference.NormStyle = self.style  # type: ignore[assignment]
        weight = self.weight.to(dtype)
        return _with_gradients(
            lambda x: reference.rms_norm(x, weight, EPS, style), [self.x.to(dtype)], self.dy.to(dtype)
        )


class _GatedActivation:
    product = False

    def __init__(self, case: Case, operands: Operands) -> None:
        self.kind = case.style
        self.gate, self.up, self.dy = (operands.activations(case.m, case.sizes[0]) for _ in range(3))

    def launch(self) -> list[Tensor]:
        kind: reference.Activation = self.kind  # type: ignore[assignment]
        y = gated_activation_triton(self.gate, self.up, kind)
        return [y, *gated_activation_backward_triton(self.dy, self.gate, self.up, kind)]

    def by_torch(self, dtype: torch.dtype) -> list[Tensor]:
        kind: reference.Activation = self.kind  # type: ignore[assignment]
        inputs = [self.gate.to(dtype), self.up.to(dtype)]
        return _with_gradients(lambda *pair: reference.gated_activation(*pair, kind), inputs, self.dy.to(dtype))


class _Rope:
    """The rotation of q and k, or its inverse, which is that of a gradient."""

    product = False

    def __init__(self, case: Case, operands: Operands) -> None:
        self.inverse = case.style == "inverse"
        batch, tokens, rotated = case.split, case.m, case.rank or case.k // 2 * 2
        self.pair = [
            operands.activations(batch * tokens, heads * case.k).unflatten(1, (heads, case.k)).unflatten(0, (batch, -1))
            for heads in case.sizes
        ]
        self.pair = [x.transpose(1, 2) for x in self.pair]
        dtype = torch.float32 if case.bias else case.dtype
        self.angles = [operands.numbers(batch, tokens, rotated, dtype=dtype) for _ in ("cos", "sin")]

    def launch(self) -> list[Tensor]:
        q, k = self.pair
        return list(rope_triton(q, k, *self.angles, inverse=self.inverse))

    def by_torch(self, dtype: torch.dtype) -> list[Tensor]:
        angles = [x.double() if dtype == torch.float64 else x for x in self.angles]
        q, k = (x.to(dtype).clone().requires_grad_(self.inverse) for x in self.pair)
        if not self.inverse:
            return list(reference.rope(q, k, *angles))
        with torch.enable_grad():
            return list(torch.autograd.grad(reference.rope(q, k, *angles), (q, k), (q.detach(), k.detach())))


class _LoraGradients:
    product = True

    def __init__(self, case: Case, operands: Operands) -> None:
        self.lefts = [operands.activations(case.m, n) for n in case.sizes]
        self.rights = operands.activations(case.m, len(case.sizes) * case.rank).split(case.rank, dim=1)
        self.out_dtype = case.dtype if case.bias else torch.float32

    def launch(self) -> list[Tensor]:
        shapes = [(left.shape[1], right.shape[1]) for left, right in zip(self.lefts, self.rights, strict=True)]
        outs = [torch.empty(shape, dtype=self.out_dtype, device=self.lefts[0].device) for shape in shapes]
        # Strides of their own, as the gradient of A has them.
        outs[1:2] = [torch.empty(out.t().shape, dtype=out.dtype, device=out.device).t() for out in outs[1:2]]
        lora_gradients_triton(self.lefts, self.rights, outs)
        return outs

    def by_torch(self, dtype: torch.dtype) -> list[Tensor]:
        pairs = list(zip(self.lefts, self.rights, strict=True))
        if dtype == torch.float64:
            return [left.double().t() @ right.double() for left, right in pairs]
        # A kernel adds one token after another, and torch in many partial sums.
        return [sequential_product(left.float().t(), right.float()).to(self.out_dtype) for left, right in pairs]


OPERATIONS: dict[CaseKernel, type[Operation]] = {
    "rms_norm": _RMSNorm,
    "rope": _Rope,
    "gated_activation": _GatedActivation,
    "lora_gradients": _LoraGradients,
}
