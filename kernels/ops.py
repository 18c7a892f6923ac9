"""The operations as ``torch.library`` ops (with fake implementations and autograd): what everything above calls.

``backend``: "triton", "panel" (plain torch), or "auto": Triton on a GPU, panels elsewhere. With "triton" the tables
choose between a fused kernel and panels that a kernel decodes, by problem and device. Triton's interpreter
(``TRITON_INTERPRET=1``) runs "triton" on the CPU, for tests; its bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

from .configs import Kernel, Problem
from .cross_entropy import int4_cross_entropy_panel
from .layout import Int4Weight
from .panel import int4_embedding_panel, int4_matmul_dx_group_panel, int4_matmul_dx_panel, int4_matmul_panel
from .tables import Route, architecture_of, choose, refuse

Backend = Literal["auto", "triton", "panel"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "panel")
Result = TypeVar("Result")


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def resolve_backend(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> Literal["triton", "panel"]:
    """The backend that ``backend`` means for this device and dtype. ValueError for an unknown or impossible one."""
    if backend == "auto":
        by_triton = device.type == "cuda" and has_triton() and dtype != torch.float64
        # Before sm_80 there are no bfloat16 instructions.
        if by_triton and dtype == torch.bfloat16 and torch.version.hip is None:
            by_triton = torch.cuda.get_device_capability(device) >= (8, 0)
        return "triton" if by_triton else "panel"
    if backend == "panel":
        return "panel"
    if backend != "triton":
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not has_triton():
        raise ValueError("backend 'triton' needs the package triton, which is not installed; use 'panel'")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend 'triton' runs on a GPU, and the tensors are on the CPU; use 'panel' or 'auto'")
    return "triton"


def _weight(
    packed: Tensor, scales: Tensor, minimum: Tensor | None, codebook: Tensor | None, in_features: int, group_size: int
) -> Int4Weight:
    return Int4Weight(packed, scales, in_features, group_size, minimum, codebook)


def _routed(
    kernel: Kernel, operand: Tensor, weights: Sequence[Int4Weight], launch: Callable[[Route], Result]
) -> Result:
    """Launches by the route that the tables give. One that the device has no room for is not taken again."""
    head, n = weights[0], sum(weight.out_features for weight in weights)
    problem = Problem(kernel, operand.shape[0], n, head.in_features, head.scheme, head.group_size, operand.dtype)
    architecture = architecture_of(operand.device)
    from triton.runtime.errors import OutOfResources

    try:
        return launch(choose(problem, architecture))
    except OutOfResources as error:
        warnings.warn(f"{choose(problem, architecture)} does not fit this device ({error}): tune again", stacklevel=2)
        refuse(problem, architecture)
    return launch(choose(problem, architecture))


@custom_op("mebp_triton::int4_matmul", mutates_args=())
def _matmul(
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

    return _routed("matmul", x, [weight], launch)


@custom_op("mebp_triton::int4_matmul_dx", mutates_args=())
def _matmul_dx(
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

    return _routed("matmul_dx", dy, [weight], launch)


@custom_op("mebp_triton::int4_embedding", mutates_args=())
def _embedding(
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
def _cross_entropy(
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


@_matmul.register_fake
def _(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


@_matmul_dx.register_fake
def _(dy: Tensor, packed: Tensor, scales: Tensor, minimum: Any, codebook: Any, in_features: int, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


@_embedding.register_fake
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


@_cross_entropy.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_grad = rest[-1]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    count, width = hidden.shape
    return (
        hidden.new_empty(count, dtype=wide),
        hidden.new_empty(count if need_grad else 0, width, dtype=wide),
        hidden.new_empty(count, dtype=torch.int64),
    )


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """``[M, N]`` with x's leading dimensions. No view, as a matmul's result is none: it may be changed in place."""
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Whoever calls ``backward`` under autocast would otherwise get its products rounded."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        with _no_autocast(grads[0]):
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
        dx = _matmul_dx(dy, packed, scales, minimum, codebook, in_features, group_size, None, None, backend)
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
        ddy = _matmul(ddx, packed, scales, minimum, codebook, in_features, group_size, None, None, None, backend)
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


_matmul.register_autograd(_without_autocast(_matmul_backward), setup_context=_matmul_setup)
_matmul_dx.register_autograd(_without_autocast(_matmul_dx_backward), setup_context=_matmul_dx_setup)
_cross_entropy.register_autograd(_cross_entropy_backward, setup_context=_cross_entropy_setup)


def _fields(weight: Int4Weight) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int]:
    return weight.packed, weight.scales, weight.minimum, weight.codebook, weight.in_features, weight.group_size


def int4_matmul(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    b: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``Y = X·Wᵀ + bias + t·bᵀ``, differentiable in x, bias, t and b.

    Args:
        x: ``[..., K]``. weight: ``[N, K]``. bias: ``[N]``.
        t: ``[..., R]``, LoRA's scaled ``X·Aᵀ``. b: ``[N, R]``, LoRA's B.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    _check("x", x, weight.in_features, weight, backend)
    flat = x.reshape(-1, x.shape[-1])
    t = None if t is None else t.reshape(-1, t.shape[-1])
    with _no_autocast(x):
        y = _matmul(flat, *_fields(weight), bias, t, b, backend)
    return _shaped(y, x)


def int4_matmul_dx(
    dy: Tensor, weight: Int4Weight, g: Tensor | None = None, a: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """``dX = dY·W + g·a``, differentiable in dy, g and a.

    Args:
        dy: ``[..., N]``. weight: ``[N, K]``. g: ``[..., R]``, LoRA's scaled ``dY·B``. a: ``[R, K]``, LoRA's A.

    Returns:
        ``[..., K]`` in dy's dtype.
    """
    _check("dy", dy, weight.out_features, weight, backend)
    flat = dy.reshape(-1, dy.shape[-1])
    g = None if g is None else g.reshape(-1, g.shape[-1])
    with _no_autocast(dy):
        dx = _matmul_dx(flat, *_fields(weight), g, a, backend)
    return dx.view(*dy.shape[:-1], weight.in_features)


def int4_matmul_group(
    x: Tensor,
    weights: Sequence[Int4Weight],
    biases: Sequence[Tensor | None],
    ts: Sequence[Tensor],
    bs: Sequence[Tensor],
    backend: str = "auto",
) -> list[Tensor]:
    """``int4_matmul`` of several weights with one input ``[..., K]``: in one launch where a fused kernel takes them.

    Args:
        weights: ``[N_i, K]`` each; biases: ``[N_i]`` or None.
        ts: ``[..., R_i]``, LoRA's scaled ``X·A_iᵀ``; bs: ``[N_i, R_i]``.

    Returns:
        ``[..., N_i]`` each. Not differentiable: for use within an autograd function.
    """
    _check("x", x, weights[0].in_features, weights[0], backend)
    flat = x.reshape(-1, x.shape[-1])
    ts = [t.reshape(-1, t.shape[-1]) for t in ts]
    with _no_autocast(x):
        outputs = _matmul_group(flat, weights, biases, ts, bs, backend)
    return [_shaped(y, x) for y in outputs]


def _matmul_group(
    x: Tensor,
    weights: Sequence[Int4Weight],
    biases: Sequence[Tensor | None],
    ts: Sequence[Tensor],
    bs: Sequence[Tensor],
    backend: str,
) -> list[Tensor]:
    def one_by_one() -> list[Tensor]:
        members = zip(weights, biases, ts, bs, strict=True)
        return [_matmul(x, *_fields(weight), bias, t, b, backend) for weight, bias, t, b in members]

    def launch(route: Route) -> list[Tensor]:
        if route is None:
            return one_by_one()
        from .matmul import int4_matmul_group_triton

        bias = None
        if any(bias is not None for bias in biases):
            pairs = zip(biases, weights, strict=True)
            bias = torch.cat([x.new_zeros(w.out_features) if b is None else b.to(x.dtype) for b, w in pairs])
        t = torch.cat([t.to(x.dtype) for t in ts], dim=1)
        b = torch.cat([b.to(x.dtype) for b in bs])
        return int4_matmul_group_triton(x, weights, bias, t, b, route)

    if resolve_backend(backend, x.device, x.dtype) == "panel" or not _alike(weights, bs):
        return one_by_one()
    return _routed("matmul", x, weights, launch)


def int4_matmul_dx_group(
    dys: Sequence[Tensor],
    weights: Sequence[Int4Weight],
    g: Tensor | None = None,
    a: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``sum dY_i·W_i + g·a``, written once.

    Args:
        dys: ``[..., N_i]`` each. weights: ``[N_i, K]`` each. g: ``[..., R]`` and a: ``[R, K]``: the members' side by
            side.

    Returns:
        ``[..., K]`` in dys' dtype. Not differentiable: for use within an autograd function.
    """
    for dy, weight in zip(dys, weights, strict=True):
        _check("dy", dy, weight.out_features, weight, backend)
    leading, k = dys[0].shape[:-1], weights[0].in_features
    dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    g = None if g is None else g.reshape(-1, g.shape[-1])
    with _no_autocast(dys[0]):
        return _matmul_dx_group(dys, weights, g, a, backend).view(*leading, k)


def _matmul_dx_group(
    dys: Sequence[Tensor], weights: Sequence[Int4Weight], g: Tensor | None, a: Tensor | None, backend: str
) -> Tensor:
    def launch(route: Route) -> Tensor:
        if route is None:
            return int4_matmul_dx_group_panel(dys, weights, g, a, by_kernel=True)
        from .matmul_dx import int4_matmul_dx_group_triton

        return int4_matmul_dx_group_triton(dys, weights, g, a, route)

    if resolve_backend(backend, dys[0].device, dys[0].dtype) == "panel":
        return int4_matmul_dx_group_panel(dys, weights, g, a)
    if _alike(weights, ()):
        return _routed("matmul_dx", dys[0], weights, launch)
    # Each by its own route; LoRA's term, which is of all of them, with the last.
    *first, last = zip(dys, weights, strict=True)
    total = _matmul_dx(last[0], *_fields(last[1]), g, a, backend)
    for dy, weight in first:
        total += _matmul_dx(dy, *_fields(weight), None, None, backend)
    return total


def _alike(weights: Sequence[Int4Weight], bs: Sequence[Tensor]) -> bool:
    from .matmul import can_group

    return can_group(weights) and len({b.shape[1] for b in bs}) <= 1


def int4_embedding(ids: Tensor, weight: Int4Weight, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """Rows ``ids`` (int64, any shape) of the table ``[V, K]``: ``[*ids.shape, K]`` in ``dtype``. Not differentiable."""
    return _embedding(ids, *_fields(weight), dtype, backend)


def int4_cross_entropy(
    hidden: Tensor,
    weight: Int4Weight,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    factors: Sequence[float] = (1.0,),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy per token over the int4 head and the argmax, differentiable in ``hidden``.

    Args:
        hidden: ``[T, K]``. weight: ``[V, K]``. targets: ``[T]`` int64. bias: ``[V]``, frozen.
        factors: what the model does to its logits, see ``cross_entropy``.

    Returns:
        losses ``[T]`` float32 or wider, 0 where ignored; argmax ``[T]`` int64, -1 where ignored.
    """
    _check("hidden", hidden, weight.in_features, weight, backend)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape {tuple(hidden.shape[:1])}, got {tuple(targets.shape)}")
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    fields, chain = _fields(weight), list(factors)
    with _no_autocast(hidden):
        losses, _, argmax = _cross_entropy(hidden, *fields, targets, bias, ignore_index, chain, backend, need_grad)
    return losses, argmax


def check_floating(name: str, tensor: Tensor) -> None:
    """TypeError for integers, as of a linear layer; modelling code that casts to ``layer.weight.dtype`` makes such."""
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} is {tensor.dtype}, wanted a floating dtype; if the model casts its activations to the dtype of an "
            f"int4 layer's weight, which is packed codes, that layer must stay float"
        )


def _check(name: str, tensor: Tensor, width: int, weight: Int4Weight, backend: str) -> None:
    check_floating(name, tensor)
    if backend == "triton" and tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: use float32 or float16, or backend 'panel'")
    if tensor.dim() == 0 or tensor.shape[-1] != width:
        raise ValueError(f"{name} must have {width} columns, got shape {tuple(tensor.shape)}")
    if tensor.device != weight.device:
        # The meta device: weights that are brought in only while their block runs.
        raise ValueError(f"{name} is on {tensor.device} and the int4 weight on {weight.device}")
