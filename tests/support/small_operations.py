"""Results and gradients of the fused small operations, against their twins in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.accuracy import judge

Function = Callable[..., Any]


def results(function: Function, inputs: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of ``function(*inputs, *fixed)``, and the gradients of the inputs for random ones of the outputs."""
    leaves = [tensor.detach().requires_grad_(True) for tensor in inputs]
    found = function(*leaves, *fixed)
    outputs = found if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(out.shape, generator=generator).to(inputs[0].dtype).to(out) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, given)]


def check(
    ours: Function, twin: Function, inputs: Sequence[Tensor], fixed: Sequence[Tensor] = (), to_the_digit: bool = True
) -> list[Tensor]:
    """Holds ``ours`` against the rule of correctness, where torch is ``twin`` in the same dtype, and in float64.

    With ``to_the_digit``, a result of 16 bits is torch's own but for the last digit of a few numbers. The inputs do not
    change. Returns what ``results`` does.
    """
    before = [tensor.clone() for tensor in (*inputs, *fixed)]
    found, same = results(ours, inputs, fixed), results(twin, inputs, fixed)
    truth = results(twin, [one.double() for one in inputs], [one.double() for one in fixed])
    for place, (own, torchs, exact) in enumerate(zip(found, same, truth, strict=True)):
        verdict = judge(own, torchs, exact)
        assert verdict["ok"], f"result {place}: {verdict['reason']}"
        if to_the_digit and own.dtype != torch.float32 and place < len(found) - len(inputs):
            assert is_torchs(own, torchs), f"result {place} is not torch's"
    assert all(map(torch.equal, before, (*inputs, *fixed)))
    return found


def is_torchs(own: Tensor, other: Tensor) -> bool:
    """Whether numbers differ by at most one unit in the last place, and no more than one in fifty does."""
    eps, least = torch.finfo(own.dtype).eps, torch.finfo(own.dtype).smallest_normal
    distance = (own.double() - other.double()).abs()
    near = distance <= eps * torch.maximum(own.double().abs(), other.double().abs()).clamp(min=least)
    return bool(near.all()) and float((distance > 0).double().mean()) <= 0.02
