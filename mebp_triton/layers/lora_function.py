"""LoRA over an int4 weight as one autograd function.

Forward: ``Y = X·Wᵀ + bias + s·(X·Aᵀ)·Bᵀ``. Backward, with ``g = s·dY·B``: ``dX = dY·W + g·A``, ``dA = gᵀ·X``,
``dB = s·dYᵀ·(X·Aᵀ)``. Nothing of size ``[N, K]`` is allocated; ``s·X·Aᵀ`` ``[M, R]`` is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mebp_triton.kernels.functions import (
    check_floating,
    int4_matmul,
    int4_matmul_dx,
    int4_matmul_dx_group,
    int4_matmul_group,
    no_autocast,
)
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.ops import shaped
from mebp_triton.kernels.token_products import lora_a_gradient, lora_b_gradients, wide_dtype

from .stacked_adapters import Adapter, Stacked, stack


class LoraOperand(NamedTuple):
    """One layer's part in a call of ``int4_lora_linears``: weight ``[N, K]``, bias ``[N]``, lora_a ``[R, K]``,
    lora_b ``[N, R]``."""

    weight: Int4Weight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class _Call(NamedTuple):
    """What a call knows besides tensors that have gradients.

    ``stacked`` are the adapters in x's dtype; None if they are still to be stacked.
    """

    weights: tuple[Int4Weight, ...]
    scalings: tuple[float, ...]
    backend: str
    stacked: Stacked | None


class _Int4LoRAFunction(torch.autograd.Function):
    """One layer, or several with one input.

    ``known`` are the outputs, if they are known and only gradients are wanted. The context must not keep them: each
    output leads back to it, and both would stay until a collection of garbage.

    ``inner`` is the input of the LoRA branch where it is another one than x (after dropout); else None. ``tensors`` are
    the bias, lora_a and lora_b of each layer in turn.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Tensor | None,
        call: _Call,
        known: tuple[Tensor, ...] | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        adapters: Any = [tensors[place : place + 3] for place in range(0, len(tensors), 3)]
        rows, branch, stacked, t = _branch(x, inner, call, adapters)
        ctx.save_for_backward(branch, t, stacked.a, stacked.b)
        ctx.call, ctx.dropped, ctx.shape = call, inner is not None, x.shape
        ctx.likes = [(None if bias is None else bias.dtype, a.shape[0], a.dtype, b.dtype) for bias, a, b in adapters]
        # The gradient of an output that nobody used stays None, so the sums of the backward pass leave it out.
        ctx.set_materialize_grads(False)
        return known if known is not None else _outputs(x, rows, call, stacked, t)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: gradient checkpointing does not hand them out a second time
        # Autocast would round the products here, if backward() is called under it.
        with no_autocast(saved[0]):
            return _lora_gradients(ctx, saved, dys)


def _branch(
    x: Tensor, inner: Tensor | None, call: _Call, adapters: Sequence[Adapter]
) -> tuple[Tensor, Tensor, Stacked, Tensor]:
    """The rows of x, those of the LoRA branch's input, the adapters, and their scaled products with it."""
    rows = _rows(x)
    branch = rows if inner is None else _rows(inner)
    stacked = call.stacked or stack(adapters, x.dtype)
    return rows, branch, stacked, _scaled_products(branch, stacked.a, call.scalings)


def _outputs(x: Tensor, rows: Tensor, call: _Call, stacked: Stacked, t: Tensor) -> tuple[Tensor, ...]:
    if len(call.weights) == 1:
        return (shaped(int4_matmul(rows, call.weights[0], stacked.bias, t, stacked.b, call.backend), x),)
    outputs = int4_matmul_group(rows, call.weights, stacked.bias, t, stacked.b, call.backend)
    return tuple([shaped(y, x) for y in outputs])


def _rows(tensor: Tensor) -> Tensor:
    """``[..., columns]`` -> ``[tokens, columns]``."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _parts(tensor: Tensor, count: int, dim: int) -> Sequence[Tensor]:
    return tensor.chunk(count, dim) if count > 1 else (tensor,)


def _scaled_products(x: Tensor, a: Tensor, scalings: Sequence[float]) -> Tensor:
    """``s_i·X·A_iᵀ`` of the members side by side: x ``[M, K]``, a ``[members * R, K]`` -> ``[M, members * R]``."""
    t = x.new_empty(x.shape[0], a.shape[0])
    if len(set(scalings)) == 1:
        return t.addmm_(x, a.t(), beta=0, alpha=scalings[0])
    count = len(scalings)
    for part, own, scaling in zip(t.chunk(count, dim=1), a.chunk(count), scalings, strict=True):
        part.addmm_(x, own.t(), beta=0, alpha=scaling)
    return t


def _lora_gradients(ctx: Any, saved: tuple[Tensor, ...], dys: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    branch, t, a, b = saved
    call: _Call = ctx.call
    need_x, need_inner, _, _, *need = ctx.needs_input_grad
    gradients: list[Tensor | None] = [None] * len(need)
    used = {place: _rows(dy.to(branch.dtype)) for place, dy in enumerate(dys) if dy is not None}
    if not used:
        return None, None, None, None, *gradients
    count = len(call.weights)
    rank = a.shape[0] // count
    bs = b.split_with_sizes([weight.out_features for weight in call.weights]) if count > 1 else (b,)
    ts = _parts(t, count, 1)
    for place, dy in used.items():
        if need[3 * place]:
            dtype = ctx.likes[place][0]
            gradients[3 * place] = dy.sum(0, dtype=wide_dtype(dtype)).to(dtype)
    of_a = [place for place in used if need[3 * place + 1]]
    of_b = [place for place in used if need[3 * place + 2]]
    for places, dtype in _by_dtype(of_b, [like[3] for like in ctx.likes]):
        products = lora_b_gradients([used[i] for i in places], [ts[i] for i in places], dtype, call.backend)
        for place, product in zip(places, products, strict=True):
            own = ctx.likes[place][1]
            gradients[3 * place + 2] = product if own == rank else product[:, :own].contiguous()
    members = list(used) if need_x or need_inner else of_a
    if not members:
        return None, None, None, None, *gradients
    g = t.new_empty(t.shape[0], len(members) * rank)
    for part, place in zip(_parts(g, len(members), 1), members, strict=True):
        part.addmm_(used[place], bs[place], beta=0, alpha=call.scalings[place])
    for _, dtype in _by_dtype(of_a, [like[2] for like in ctx.likes]):
        product = lora_a_gradient(g, branch, dtype, call.backend)
        for part, place in zip(_parts(product, len(members), 0), members, strict=True):
            _, own, like, _ = ctx.likes[place]
            if place in of_a and like == dtype:
                gradients[3 * place + 1] = part if own == rank else part[:own]
    if len(members) < len(call.weights):
        a = torch.cat([a[place * rank : (place + 1) * rank] for place in members])
    dx = dinner = None
    if need_inner:
        dinner = (g @ a).view(ctx.shape)
    if need_x:
        term: Any = (None, None) if ctx.dropped else (g, a)
        weights, rows = [call.weights[place] for place in members], [used[place] for place in members]
        if len(members) == 1:
            dx = int4_matmul_dx(rows[0], weights[0], *term, call.backend)
        else:
            dx = int4_matmul_dx_group(rows, weights, *term, call.backend)
        dx = dx.view(ctx.shape)
    return dx, dinner, None, None, *gradients


def _by_dtype(places: list[int], dtypes: list[torch.dtype]) -> list[tuple[list[int], torch.dtype]]:
    """The places by their dtype, of which a group nearly always has one."""
    return [([p for p in places if dtypes[p] == dtype], dtype) for dtype in dict.fromkeys(dtypes[p] for p in places)]


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
    x: Tensor,
    operands: Sequence[LoraOperand],
    backend: str = "auto",
    known: tuple[Tensor, ...] | None = None,
    stacked: Stacked | None = None,
    inner: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Computes ``int4_lora_linear`` for several layers with one input.

    One launch serves all of them where a kernel takes them together, and dX is written once.

    Args:
        known: the outputs of all layers, if they are known.
        stacked: the operands' adapters in x's dtype, if they are at hand.
        inner: ``[..., K]``, of x's dtype: the input of the LoRA branch, if it is not x itself.
    """
    x = autocast_input(x)
    tensors = [tensor for operand in operands for tensor in (operand.bias, operand.lora_a, operand.lora_b)]
    weights = tuple([operand.weight for operand in operands])
    scalings = tuple([operand.scaling for operand in operands])
    call = _Call(weights, scalings, backend, stacked)
    with no_autocast(x):
        if torch.is_grad_enabled():
            return _Int4LoRAFunction.apply(x, inner, call, known, *tensors)
        if known is not None:
            return known
        rows, _, stacked, t = _branch(x, inner, call, [operand[1:4] for operand in operands])
        return _outputs(x, rows, call, stacked, t)


def autocast_input(x: Tensor) -> Tensor:
    """Returns x in the dtype in which a linear layer would compute here. Raises TypeError for integers."""
    check_floating("x", x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x
