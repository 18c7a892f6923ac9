"""The operations as ``torch.library`` ops, with fake implementations and autograd. ``functions`` calls them.

``backend`` is "triton", "panel" (plain torch), or "auto", which is Triton on a GPU and panels elsewhere. With "triton"
the tables choose between a fused kernel and panels that a kernel decodes, by problem and device. Triton's interpreter
(``TRITON_INTERPRET=1``) runs "triton" on the CPU for tests, but its bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .cross_entropy import int4_cross_entropy_panel
from .layout import Int4Weight
from .panel import int4_embedding_panel, int4_matmul_dx_panel, int4_matmul_panel
from .routing import resolve_backend, routed
from .tables import Route


def _weight(
    packed: Tensor, scales: Tensor, minimum: Tensor | None, codebook: Tensor | None, in_features: int, group_size: int
) -> Int4Weight:
    return Int4Weight(packed, scales, in_features, group_size, minimum, codebook)


@custom_op("mebp_triton::int4_matmul", mutates_args=())
def matmul_op(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    minimum: Tensor | None,
    codebook: Tensor | None,
    in_features: int,
    group_size: int,
    bias: Tensor | None,
    t: Tensor | None,
    b: Tensor | None,
    backend: str,
) -> Tensor:
    weight = _weight(packed, scales, minimum, codebook, in_features, group_size)
    if resolve_backend(backend, x.device, x.dtype) == "panel":
        return int4_matmul_panel(x, weight, bias, t, b)

    def launch(route: Route) -> Tensor:
        if route is None:
            return int4_matmul_panel(x, weight, bias, t, b, by_kernel=True)
        from .matmul import int4_matmul_triton

        return int4_matmul_triton(x, weight, bias, t, b, route)

    return routed("matmul", x, [weight], launch)


@custom_op("mebp_triton::int4_matmul_dx", mutates_args=())
def matmul_dx_op(
    dy: Tensor,
    packed: Tensor,
    scales: Tensor,
    minimum: Tensor | None,
    codebook: Tensor | None,
    in_features: int,
    group_size: int,
    g: Tensor | None,
    a: Tensor | None,
    backend: str,
) -> Tensor:
    weight = _weight(packed, scales, minimum, codebook, in_features, group_size)
    if resolve_backend(backend, dy.device, dy.dtype) == "panel":
        return int4_matmul_dx_panel(dy, weight, g, a)

    def launch(route: Route) -> Tensor:
        if route is None:
            return int4_matmul_dx_panel(dy, weight, g, a, by_kernel=True)
        from .matmul_dx import int4_matmul_dx_triton

        return int4_matmul_dx_triton(dy, weight, g, a, route)

    return routed("matmul_dx", dy, [weight], launch)


@custom_op("mebp_triton::int4_embedding", mutates_args=())
def embedding_op(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    minimum: Tensor | None,
    codebook: Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    weight = _weight(packed, scales, minimum, codebook, in_features, group_size)
    if resolve_backend(backend, packed.device, dtype) == "triton":
        from .embedding import int4_embedding_triton

        return int4_embedding_triton(ids, weight, dtype)
    return int4_embedding_panel(ids, weight, dtype)


@custom_op("mebp_triton::int4_cross_entropy", mutates_args=())
def cross_entropy_op(
    hidden: Tensor,
    packed: Tensor,
    scales: Tensor,
    minimum: Tensor | None,
    codebook: Tensor | None,
    in_features: int,
    group_size: int,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    factors: Sequence[float],
    backend: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight = _weight(packed, scales, minimum, codebook, in_features, group_size)
    by_kernel = resolve_backend(backend, hidden.device, hidden.dtype) == "triton"
    return int4_cross_entropy_panel(hidden, weight, targets, bias, ignore_index, factors, need_grad, by_kernel)


@matmul_op.register_fake
def _(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


@matmul_dx_op.register_fake
def _(dy: Tensor, packed: Tensor, scales: Tensor, minimum: Any, codebook: Any, in_features: int, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


@embedding_op.register_fake
def _(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    minimum: Any,
    codebook: Any,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return packed.new_empty((*ids.shape, in_features), dtype=dtype)


@cross_entropy_op.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_grad = rest[-1]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    count, width = hidden.shape
    return (
        hidden.new_empty(count, dtype=wide),
        hidden.new_empty(count if need_grad else 0, width, dtype=wide),
        hidden.new_empty(count, dtype=torch.int64),
    )


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """``y`` ``[M, N]`` with x's leading dimensions. It is no view for autograd, so it may be changed in place."""
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """While active, autocast is off for the tensor's device."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a backward function with autocast off, which would round its products."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        with no_autocast(grads[0]):
            return backward(ctx, *grads)

    return run


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, minimum, codebook, in_features, group_size, bias, t, b, backend = inputs
    ctx.save_for_backward(packed, scales, minimum, codebook, t, b)
    ctx.meta = (in_features, group_size, backend)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    packed, scales, minimum, codebook, t, b = ctx.saved_tensors
    in_features, group_size, backend = ctx.meta
    need = ctx.needs_input_grad
    dx = dbias = dt = db = None
    if need[0]:
        dx = matmul_dx_op(dy, packed, scales, minimum, codebook, in_features, group_size, None, None, backend)
    if need[7]:
        dbias = dy.sum(0).to(ctx.bias_dtype)
    if t is not None and b is not None:
        if need[8]:
            dt = (dy @ b.to(dy.dtype)).to(t.dtype)
        if need[9]:
            db = (dy.t() @ t.to(dy.dtype)).to(b.dtype)
    return dx, None, None, None, None, None, None, dbias, dt, db, None


def _matmul_dx_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, packed, scales, minimum, codebook, in_features, group_size, g, a, backend = inputs
    ctx.save_for_backward(packed, scales, minimum, codebook, g, a)
    ctx.meta = (in_features, group_size, backend)


def _matmul_dx_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    packed, scales, minimum, codebook, g, a = ctx.saved_tensors
    in_features, group_size, backend = ctx.meta
    need = ctx.needs_input_grad
    ddy = dg = da = None
    if need[0]:
        ddy = matmul_op(ddx, packed, scales, minimum, codebook, in_features, group_size, None, None, None, backend)
    if g is not None and a is not None:
        if need[7]:
            dg = (ddx @ a.to(ddx.dtype).t()).to(g.dtype)
        if need[8]:
            da = (g.to(ddx.dtype).t() @ ddx).to(a.dtype)
    return ddy, None, None, None, None, None, None, dg, da, None


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
    return ((dlosses.unsqueeze(1) * grad).to(ctx.dtype), *([None] * 12))


matmul_op.register_autograd(_without_autocast(_matmul_backward), setup_context=_matmul_setup)
matmul_dx_op.register_autograd(_without_autocast(_matmul_dx_backward), setup_context=_matmul_dx_setup)
cross_entropy_op.register_autograd(_cross_entropy_backward, setup_context=_cross_entropy_setup)
