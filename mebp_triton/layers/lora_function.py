"""LoRA over an int4 weight as one autograd function.

Forward: ``Y = X·Wᵀ + bias + s·(X·Aᵀ)·Bᵀ``. Backward, with ``g = s·dY·B``: ``dX = dY·W + g·A``, ``dA = gᵀ·X``,
``dB = s·dYᵀ·(X·Aᵀ)``. Nothing of size ``[N, K]`` is allocated; ``s·X·Aᵀ`` ``[M, R]`` is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mebp_triton.kernels.functions import (
    check_floating,
    int4_matmul,
    int4_matmul_dx,
    int4_matmul_dx_group,
    int4_matmul_group,
)
from mebp_triton.kernels.layout import Int4Weight


@dataclass(frozen=True)
class LoraOperand:
    """One layer's part in a call of ``int4_lora_linears``: weight ``[N, K]``, bias ``[N]``, lora_a ``[R, K]``,
    lora_b ``[N, R]``."""

    weight: Int4Weight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class _Int4LoRAFunction(torch.autograd.Function):
    """One layer, or several with one input. ``tensors`` are the bias, lora_a and lora_b of each layer in turn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: tuple[Int4Weight, ...],
        scalings: tuple[float, ...],
        backend: str,
        known: tuple[Tensor, ...] | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        biases: Any = tensors[0::3]
        lora_as: Any = tensors[1::3]
        lora_bs: Any = tensors[2::3]
        t = x @ _concatenated(lora_as, x.dtype).t()  # [..., sum of R]
        ts = t.split([b.shape[1] for b in lora_bs], dim=-1)
        for part, scaling in zip(ts, scalings, strict=True):
            part.mul_(scaling)
        ctx.save_for_backward(x, t, *tensors)
        ctx.weights, ctx.scalings, ctx.backend = weights, scalings, backend
        # The gradient of an output that nobody used stays None, so the sums of the backward pass leave it out.
        ctx.set_materialize_grads(False)
        if known is not None:
            return known
        if len(weights) == 1:
            return (int4_matmul(x, weights[0], biases[0], t, lora_bs[0], backend),)
        return tuple(int4_matmul_group(x, weights, biases, ts, lora_bs, backend))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: gradient checkpointing does not hand them out a second time
        # Autocast would round the products here, if backward() is called under it.
        with torch.autocast(saved[0].device.type, enabled=False):
            return _lora_gradients(ctx, saved, dys)


def _concatenated(lora_as: Sequence[Any], dtype: torch.dtype) -> Tensor:
    given = [a.to(dtype) for a in lora_as]
    return given[0] if len(given) == 1 else torch.cat(given)


def _lora_gradients(ctx: Any, saved: tuple[Tensor, ...], dys: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    x, t, *tensors = saved
    need_x, _, _, _, _, *need = ctx.needs_input_grad
    ts = t.split([a.shape[0] for a in tensors[1::3]], dim=-1)
    gradients: list[Tensor | None] = [None] * len(tensors)
    used = [index for index, dy in enumerate(dys) if dy is not None]
    if not used:
        return None, None, None, None, None, *gradients
    rounded: list[Tensor] = []
    gs: list[Tensor] = []
    for index in used:
        bias, _, lora_b = tensors[3 * index : 3 * index + 3]
        need_bias, need_a, need_b = need[3 * index : 3 * index + 3]
        dy: Any = dys[index]
        dy = dy.to(x.dtype)
        rounded.append(dy)
        if need_x or need_a:
            gs.append((dy @ lora_b.to(x.dtype)).mul_(ctx.scalings[index]))  # [..., R]
        if need_bias:
            total = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=_wide(bias.dtype))
            gradients[3 * index] = total.to(bias.dtype)
        if need_a:
            gradients[3 * index + 1] = _reduce_tokens(gs[-1], x, tensors[3 * index + 1].dtype)
        if need_b:
            gradients[3 * index + 2] = _reduce_tokens(dy, ts[index], lora_b.dtype)
    dx = None
    if need_x:
        weights = [ctx.weights[index] for index in used]
        if len(used) == 1:
            dx = int4_matmul_dx(rounded[0], weights[0], gs[0], tensors[3 * used[0] + 1], ctx.backend)
        else:
            a = _concatenated([tensors[3 * index + 1] for index in used], x.dtype)
            dx = int4_matmul_dx_group(rounded, weights, torch.cat(gs, dim=-1), a, ctx.backend)
    return dx, None, None, None, None, *gradients


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reduce_tokens(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``leftᵀ·right`` over all tokens, accumulated in float32 or wider: ``[..., P]``, ``[..., Q]`` -> ``[P, Q]``."""
    wide = torch.promote_types(_wide(left.dtype), _wide(dtype))
    left, right = (tensor.reshape(-1, tensor.shape[-1]).to(wide) for tensor in (left, right))
    return (left.t() @ right).to(dtype)


def int4_lora_linear(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    backend: str = "auto",
    known: Tensor | None = None,
) -> Tensor:
    """``Y = X·Wᵀ + bias + scaling·(X·Aᵀ)·Bᵀ``, differentiable in x, bias, lora_a and lora_b.

    Args:
        x: ``[..., K]``; under autocast it is cast to the autocast dtype.
        weight: ``[N, K]``. bias: ``[N]``.
        lora_a: ``[R, K]``. lora_b: ``[N, R]``. Their gradients have their own dtype, and are accumulated in float32.
        known: the output ``[..., N]``, if it is known and only gradients are wanted. It becomes the result.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        TypeError: x is not floating-point.
    """
    outputs = None if known is None else (known,)
    return int4_lora_linears(x, [LoraOperand(weight, bias, lora_a, lora_b, scaling)], backend, outputs)[0]


def int4_lora_linears(
    x: Tensor, operands: Sequence[LoraOperand], backend: str = "auto", known: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """Computes ``int4_lora_linear`` for several layers with one input.

    One launch serves all of them where a kernel takes them together, and dX is written once. If given, ``known`` are
    the outputs of all layers.
    """
    x = autocast_input(x)
    tensors = [tensor for operand in operands for tensor in (operand.bias, operand.lora_a, operand.lora_b)]
    weights = tuple(operand.weight for operand in operands)
    scalings = tuple(operand.scaling for operand in operands)
    with torch.autocast(x.device.type, enabled=False):
        return _Int4LoRAFunction.apply(x, weights, scalings, backend, known, *tensors)


def autocast_input(x: Tensor) -> Tensor:
    """Returns x in the dtype in which a linear layer would compute here. Raises TypeError for integers."""
    check_floating("x", x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x
