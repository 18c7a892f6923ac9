"""The operations, differentiable, and as ``torch.library`` ops for what traces them. ``functions`` calls them.

An op's way through torch's dispatcher takes the host several times as long as a kernel takes to launch. So ``matmul``
and ``matmul_dx`` go that way only where something watches: a compiler, a mode, vmap, a tensor's class.

``backend`` is "triton", "panel" (plain torch), or "auto", which is Triton on a GPU and panels elsewhere. With "triton"
the tables choose between a fused kernel and panels that a kernel decodes, by problem and device. Triton's interpreter
(``TRITON_INTERPRET=1``) runs "triton" on the CPU for tests, but its bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .configs import Panel
from .cross_entropy import int4_cross_entropy_panel
from .layout import Int4Weight
from .panel import int4_embedding_panel, int4_matmul_dx_group_panel, int4_matmul_dx_panel, int4_matmul_panel
from .routing import resolve_backend, routed
from .tables import Route
from .workspace import is_watched

# A weight in a schema: the fields of ``Int4Weight`` in their order.
WEIGHT = (
    "Tensor packed, Tensor scales, SymInt in_features, SymInt group_size, Tensor? minimum, Tensor? codebook, "
    "Tensor? super_scales, Tensor? super_minimum"
)
FIELDS = len(fields(Int4Weight))
PACKED, IN_FEATURES = 0, 2


def fields_of(weight: Int4Weight) -> tuple[Any, ...]:
    """A weight as arguments of an operation."""
    return tuple(getattr(weight, field.name) for field in fields(weight))


def take_weight(given: Sequence[Any]) -> tuple[Int4Weight, Sequence[Any]]:
    """Arguments of an operation, from its weight on: the weight, and what follows it."""
    return Int4Weight(*given[:FIELDS]), given[FIELDS:]


# What runs in an op's place where a trace must see what it allocates, by the op.
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}


def _op(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as an op of this name, which mutates none of its arguments."""

    def register(function: Callable[..., Any]) -> Any:
        op = custom_op(f"mebp_triton::{name}", function, mutates_args=(), schema=schema)
        IMPLEMENTATIONS[getattr(torch.ops.mebp_triton, name).default] = function
        return op

    return register


@_op("int4_matmul", f"(Tensor x, {WEIGHT}, Tensor? bias, Tensor? t, Tensor? b, str backend) -> Tensor")
def matmul_op(x: Tensor, *given: Any) -> Tensor:
    weight, rest = take_weight(given)
    return _run_matmul(x, weight, *rest)


def _run_matmul(
    x: Tensor, weight: Int4Weight, bias: Tensor | None, t: Tensor | None, b: Tensor | None, backend: str
) -> Tensor:
    if resolve_backend(backend, x.device, x.dtype) == "panel":
        return int4_matmul_panel(x, weight, bias, t, b)

    def launch(route: Route) -> Tensor:
        if isinstance(route, Panel):
            return int4_matmul_panel(x, weight, bias, t, b, True, route.elements)
        from .matmul import int4_matmul_triton

        return int4_matmul_triton(x, weight, bias, t, b, route)

    return routed("matmul", x, [weight], launch)


@_op("int4_matmul_dx", f"(Tensor dy, {WEIGHT}, Tensor? g, Tensor? a, str backend) -> Tensor")
def matmul_dx_op(dy: Tensor, *given: Any) -> Tensor:
    weight, rest = take_weight(given)
    return _run_matmul_dx(dy, weight, *rest)


def _run_matmul_dx(dy: Tensor, weight: Int4Weight, g: Tensor | None, a: Tensor | None, backend: str) -> Tensor:
    if resolve_backend(backend, dy.device, dy.dtype) == "panel":
        return int4_matmul_dx_panel(dy, weight, g, a)

    def launch(route: Route) -> Tensor:
        if isinstance(route, Panel):
            return int4_matmul_dx_panel(dy, weight, g, a, True, route.elements)
        from .matmul_dx import int4_matmul_dx_triton

        return int4_matmul_dx_triton(dy, weight, g, a, route)

    return routed("matmul_dx", dy, [weight], launch)


@_op(
    "int4_matmul_dx_group",
    "(Tensor[] dys, Tensor[] packed, Tensor[] scales, SymInt[] in_features, SymInt[] group_size, Tensor?[] minimum, "
    "Tensor?[] codebook, Tensor?[] super_scales, Tensor?[] super_minimum, Tensor? g, Tensor? a) -> Tensor",
)
def matmul_dx_group_op(dys: list[Tensor], *given: Any) -> Tensor:
    """On a CPU; each field is a list of those of all weights."""
    weights = [Int4Weight(*of_one) for of_one in zip(*given[:FIELDS], strict=True)]
    return int4_matmul_dx_group_panel(dys, weights, *given[FIELDS:])


@_op("int4_embedding", f"(Tensor ids, {WEIGHT}, ScalarType dtype, str backend) -> Tensor")
def embedding_op(ids: Tensor, *given: Any) -> Tensor:
    weight, (dtype, backend) = take_weight(given)
    if resolve_backend(backend, weight.device, dtype) == "triton":
        from .embedding import int4_embedding_triton

        return int4_embedding_triton(ids, weight, dtype)
    return int4_embedding_panel(ids, weight, dtype)


@_op(
    "int4_cross_entropy",
    f"(Tensor hidden, {WEIGHT}, Tensor targets, Tensor? bias, SymInt ignore_index, float[] factors, "
    "str backend, bool need_grad) -> (Tensor, Tensor, Tensor)",
)
def cross_entropy_op(hidden: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, (targets, bias, ignore_index, factors, backend, need_grad) = take_weight(given)
    by_kernel = resolve_backend(backend, hidden.device, hidden.dtype) == "triton"
    return int4_cross_entropy_panel(hidden, weight, targets, bias, ignore_index, factors, need_grad, by_kernel)


@matmul_op.register_fake
def _(x: Tensor, *given: Any) -> Tensor:
    return x.new_empty(x.shape[0], given[PACKED].shape[0])


@matmul_dx_op.register_fake
def _(dy: Tensor, *given: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], given[IN_FEATURES])


@matmul_dx_group_op.register_fake
def _(dys: list[Tensor], *given: Any) -> Tensor:
    return dys[0].new_empty(dys[0].shape[0], given[IN_FEATURES][0])


@embedding_op.register_fake
def _(ids: Tensor, *given: Any) -> Tensor:
    return given[PACKED].new_empty((*ids.shape, given[IN_FEATURES]), dtype=given[FIELDS])


@cross_entropy_op.register_fake
def _(hidden: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_grad = given[-1]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    count, width = hidden.shape
    return (
        hidden.new_empty(count, dtype=wide),
        hidden.new_empty(count if need_grad else 0, width, dtype=wide),
        hidden.new_empty(count, dtype=torch.int64),
    )


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """``y`` ``[M, N]``, which nothing else refers to, with x's leading dimensions.

    It is no view for autograd, so it may be changed in place.
    """
    if x.dim() == 2:
        return y
    if y.requires_grad or not y.is_contiguous() or is_watched(y):
        return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return y.resize_(*x.shape[:-1], y.shape[-1])


NOTHING = nullcontext()  # may be entered any number of times
# Devices that have autocast. Asked once: the compiler of torch 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """While active, autocast is off for the tensor's device."""
    kind = tensor.device.type
    on = kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else NOTHING


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a backward function with autocast off, which would round its products."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        with no_autocast(grads[0]):
            return backward(ctx, *grads)

    return run


def _keep_weight(ctx: Any, weight: Sequence[Any], *others: Tensor | None) -> None:
    """Keeps a weight's fields, and other tensors, for the backward pass."""
    tensors = [field if isinstance(field, Tensor) else None for field in weight]
    ctx.save_for_backward(*tensors, *others)
    ctx.sizes = [None if isinstance(field, Tensor) else field for field in weight]


def _kept(ctx: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """The weight's fields and the other tensors, as ``_keep_weight`` kept them."""
    saved = ctx.saved_tensors
    weight = [size if tensor is None else tensor for tensor, size in zip(saved[:FIELDS], ctx.sizes, strict=True)]
    return weight, saved[FIELDS:]


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, bias, t, b, ctx.backend = inputs
    _keep_weight(ctx, weight, t, b)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, (t, b) = _kept(ctx)
    need_x, *_, need_bias, need_t, need_b, _ = ctx.needs_input_grad
    dx = matmul_dx_op(dy, *weight, None, None, ctx.backend) if need_x else None
    dbias = dy.sum(0).to(ctx.bias_dtype) if need_bias else None
    return dx, *[None] * FIELDS, dbias, *_matmul_lora_gradients(dy, t, b, need_t, need_b), None


def _matmul_lora_gradients(
    dy: Tensor, t: Tensor | None, b: Tensor | None, need_t: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    if t is None or b is None:
        return None, None
    dt = (dy @ b.to(dy.dtype)).to(t.dtype) if need_t else None
    db = (dy.t() @ t.to(dy.dtype)).to(b.dtype) if need_b else None
    return dt, db


def _matmul_dx_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, g, a, ctx.backend = inputs
    _keep_weight(ctx, weight, g, a)


def _matmul_dx_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    weight, (g, a) = _kept(ctx)
    need_dy, *_, need_g, need_a, _ = ctx.needs_input_grad
    ddy = matmul_op(ddx, *weight, None, None, None, ctx.backend) if need_dy else None
    return ddy, *[None] * FIELDS, *_matmul_dx_lora_gradients(ddx, g, a, need_g, need_a), None


def _matmul_dx_lora_gradients(
    ddx: Tensor, g: Tensor | None, a: Tensor | None, need_g: bool, need_a: bool
) -> tuple[Tensor | None, Tensor | None]:
    if g is None or a is None:
        return None, None
    dg = (ddx @ a.to(ddx.dtype).t()).to(g.dtype) if need_g else None
    da = (g.to(ddx.dtype).t() @ ddx).to(a.dtype) if need_a else None
    return dg, da


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, need_grad = inputs[0], inputs[-1]
    _, grad, argmax = output
    ctx.mark_non_differentiable(grad, argmax)
    ctx.save_for_backward(grad)
    ctx.dtype, ctx.need_grad = hidden.dtype, need_grad


def _cross_entropy_backward(ctx: Any, dlosses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if not ctx.need_grad:
        raise RuntimeError("cross-entropy ran with need_grad=False: it kept nothing to run backward from")
    (grad,) = ctx.saved_tensors
    return (dlosses.unsqueeze(1) * grad).to(ctx.dtype), *[None] * (FIELDS + 6)


matmul_op.register_autograd(_without_autocast(_matmul_backward), setup_context=_matmul_setup)
matmul_dx_op.register_autograd(_without_autocast(_matmul_dx_backward), setup_context=_matmul_dx_setup)
cross_entropy_op.register_autograd(_cross_entropy_backward, setup_context=_cross_entropy_setup)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        t: Tensor | None,
        b: Tensor | None,
        weight: Int4Weight,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(t, b)
        ctx.weight, ctx.backend, ctx.bias_dtype = weight, backend, None if bias is None else bias.dtype
        return _run_matmul(x, weight, bias, t, b, backend)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        t, b = ctx.saved_tensors
        need_x, need_bias, need_t, need_b, _, _ = ctx.needs_input_grad
        dx = matmul_dx(dy, ctx.weight, None, None, ctx.backend) if need_x else None
        dbias = dy.sum(0).to(ctx.bias_dtype) if need_bias else None
        return dx, dbias, *_matmul_lora_gradients(dy, t, b, need_t, need_b), None, None


class _MatmulDx(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, g: Tensor | None, a: Tensor | None, weight: Int4Weight, backend: str) -> Tensor:
        ctx.save_for_backward(g, a)
        ctx.weight, ctx.backend = weight, backend
        return _run_matmul_dx(dy, weight, g, a, backend)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        g, a = ctx.saved_tensors
        need_dy, need_g, need_a, _, _ = ctx.needs_input_grad
        ddy = matmul(ddx, ctx.weight, None, None, None, ctx.backend) if need_dy else None
        return ddy, *_matmul_dx_lora_gradients(ddx, g, a, need_g, need_a), None, None


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def matmul(
    x: Tensor, weight: Int4Weight, bias: Tensor | None, t: Tensor | None, b: Tensor | None, backend: str
) -> Tensor:
    """``matmul_op``, by the shortest way that is possible here."""
    if is_watched(x):
        return matmul_op(x, *fields_of(weight), bias, t, b, backend)
    if _differentiated(x, bias, t, b):
        return _Matmul.apply(x, bias, t, b, weight, backend)
    return _run_matmul(x, weight, bias, t, b, backend)


def matmul_dx(dy: Tensor, weight: Int4Weight, g: Tensor | None, a: Tensor | None, backend: str) -> Tensor:
    """``matmul_dx_op``, by the shortest way that is possible here."""
    if is_watched(dy):
        return matmul_dx_op(dy, *fields_of(weight), g, a, backend)
    if _differentiated(dy, g, a):
        return _MatmulDx.apply(dy, g, a, weight, backend)
    return _run_matmul_dx(dy, weight, g, a, backend)
