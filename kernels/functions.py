"""The operations as functions of ``Int4Weight``, which every layer calls. ``backend`` is described in ``ops``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .configs import Kernel, Panel, TileConfig
from .layout import Int4Weight
from .native import takes
from .ops import cross_entropy_op, embedding_op, fields_of, matmul, matmul_dx, matmul_dx_group_op, no_autocast, shaped
from .panel import int4_matmul_dx_group_panel, int4_matmul_group_native
from .routing import resolve_backend, routed, routed_over_experts
from .tables import Route, architecture_of
from .workspace import is_traced, is_watched

if TYPE_CHECKING:
    from .expert_table import Experts


def int4_matmul(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    b: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes ``Y = X·Wᵀ + bias + t·bᵀ``, differentiable in x, bias, t and b.

    Args:
        x: ``[..., K]``. weight: ``[N, K]``. bias: ``[N]``.
        t: ``[..., R]``, LoRA's scaled ``X·Aᵀ``. b: ``[N, R]``, LoRA's B.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        TypeError: x is not floating. ValueError: shapes, devices or the backend do not fit.
    """
    _check("x", x, weight.in_features, weight, backend)
    flat = x.reshape(-1, x.shape[-1])
    t = None if t is None else t.reshape(-1, t.shape[-1])
    with no_autocast(x):
        y = matmul(flat, weight, bias, t, b, backend)
    return shaped(y, x)


def int4_matmul_dx(
    dy: Tensor, weight: Int4Weight, g: Tensor | None = None, a: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Computes ``dX = dY·W + g·a``, differentiable in dy, g and a.

    Args:
        dy: ``[..., N]``. weight: ``[N, K]``. g: ``[..., R]``, LoRA's scaled ``dY·B``. a: ``[R, K]``, LoRA's A.

    Returns:
        ``[..., K]`` in dy's dtype.

    Raises:
        TypeError: dy is not floating. ValueError: shapes, devices or the backend do not fit.
    """
    _check("dy", dy, weight.out_features, weight, backend)
    flat = dy.reshape(-1, dy.shape[-1])
    g = None if g is None else g.reshape(-1, g.shape[-1])
    with no_autocast(dy):
        dx = matmul_dx(flat, weight, g, a, backend)
    return dx.view(*dy.shape[:-1], weight.in_features)


def int4_matmul_group(
    x: Tensor,
    weights: Sequence[Int4Weight],
    bias: Tensor | None,
    t: Tensor,
    b: Tensor,
    backend: str = "auto",
) -> list[Tensor]:
    """Computes ``int4_matmul`` of several weights with one input, in one launch where a fused kernel takes them.

    Not differentiable: it is for use within an autograd function.

    Args:
        x: ``[..., K]``.
        weights: ``[N_i, K]`` each.
        bias: ``[sum N_i]``, the members' below each other. b: ``[sum N_i, R]``, LoRA's B, likewise.
        t: ``[..., members * R]``, LoRA's scaled ``X·A_iᵀ`` of the members side by side.

    Returns:
        ``[..., N_i]`` each, in x's dtype.
    """
    _check("x", x, weights[0].in_features, weights[0], backend)
    flat = x.reshape(-1, x.shape[-1])
    t = t.reshape(-1, t.shape[-1])
    with no_autocast(x):
        outputs = _matmul_group(flat, weights, bias, t, b, backend)
    return [shaped(y, x) for y in outputs]


def _matmul_group(
    x: Tensor, weights: Sequence[Int4Weight], bias: Tensor | None, t: Tensor, b: Tensor, backend: str
) -> list[Tensor]:
    def one_by_one() -> list[Tensor]:
        sizes = [weight.out_features for weight in weights]
        biases = [None] * len(weights) if bias is None else bias.split(sizes)
        members = zip(weights, biases, t.split(b.shape[1], dim=1), b.split(sizes), strict=True)
        return [matmul(x, weight, *operands, backend) for weight, *operands in members]

    def launch(route: Route) -> list[Tensor]:
        if isinstance(route, Panel):
            return one_by_one()
        from .matmul import int4_matmul_group_triton

        return int4_matmul_group_triton(x, weights, bias, t, b, route)

    if resolve_backend(backend, x.device, x.dtype) == "panel":
        together = takes(x) and not is_watched(x)
        return int4_matmul_group_native(x, weights, bias, t, b) if together else one_by_one()
    if not _alike(weights):
        return one_by_one()
    return routed("matmul", x, weights, launch)


def int4_matmul_dx_group(
    dys: Sequence[Tensor],
    weights: Sequence[Int4Weight],
    g: Tensor | None = None,
    a: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes ``dX = sum dY_i·W_i + g·a`` and writes it once.

    Not differentiable: it is for use within an autograd function.

    Args:
        dys: ``[..., N_i]`` each. weights: ``[N_i, K]`` each.
        g: ``[..., R]``, the members' side by side. a: ``[R, K]``, the members' below each other.

    Returns:
        ``[..., K]`` in the gradients' dtype.
    """
    for dy, weight in zip(dys, weights, strict=True):
        _check("dy", dy, weight.out_features, weight, backend)
    leading, k = dys[0].shape[:-1], weights[0].in_features
    dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    g = None if g is None else g.reshape(-1, g.shape[-1])
    with no_autocast(dys[0]):
        return _matmul_dx_group(dys, weights, g, a, backend).view(*leading, k)


def _matmul_dx_group(
    dys: Sequence[Tensor], weights: Sequence[Int4Weight], g: Tensor | None, a: Tensor | None, backend: str
) -> Tensor:
    def launch(route: Route) -> Tensor:
        if isinstance(route, Panel):
            return int4_matmul_dx_group_panel(dys, weights, g, a, True, route.elements)
        from .matmul_dx import int4_matmul_dx_group_triton

        return int4_matmul_dx_group_triton(dys, weights, g, a, route)

    if resolve_backend(backend, dys[0].device, dys[0].dtype) == "panel":
        if takes(dys[0]) and is_watched(dys[0]) and not is_traced(dys[0]):
            # Compiled code calls no operations of torch, so that it has to be seen as one.
            fields = zip(*map(fields_of, weights), strict=True)
            return matmul_dx_group_op(list(dys), *map(list, fields), g, a)
        return int4_matmul_dx_group_panel(dys, weights, g, a)
    if _alike(weights):
        return routed("matmul_dx", dys[0], weights, launch)
    # Each member goes by its own route. LoRA's term, which belongs to all members, goes with the last.
    *first, last = zip(dys, weights, strict=True)
    total = matmul_dx(last[0], last[1], g, a, backend)
    for dy, weight in first:
        total += matmul_dx(dy, weight, None, None, backend)
    return total


def int4_expert_products(
    x: Tensor,
    weights: Sequence[Int4Weight],
    rows: Sequence[int],
    t: Tensor | None = None,
    b: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes ``Y_i = X_i·W_iᵀ + t_i·b_iᵀ`` for weights of one shape, each with rows of its own.

    It is one launch where a fused kernel takes the weights: they are of one form, and lie in one storage.
    Not differentiable: it is for use within an autograd function.

    Args:
        x: ``[S, K]``: the rows of the first weight, then those of the second, and so on.
        weights: ``[N, K]`` each, at least one. rows: how many rows of x each of them has; S in all.
        t: ``[S, R]``, LoRA's scaled ``X_i·A_iᵀ``. b: ``[weights, N, R]``, LoRA's B of each.

    Returns:
        ``[S, N]`` in x's dtype.
    """
    _check("x", x, weights[0].in_features, weights[0], backend)

    def one_by_one() -> Tensor:
        y = x.new_empty(x.shape[0], weights[0].out_features)
        for weight, own_x, own_y, own_t, own_b in _by_expert(weights, rows, (x, y, t), b):
            own_y.copy_(matmul(own_x, weight, None, own_t, own_b, backend))
        return y

    def together(experts: Experts, route: TileConfig) -> Tensor:
        from .expert_products import int4_expert_products_triton

        return int4_expert_products_triton(x, experts, rows, t, b, route)

    with no_autocast(x):
        return _expert_products("matmul", x, weights, backend, one_by_one, together)


def int4_expert_products_dx(
    dy: Tensor,
    weights: Sequence[Int4Weight],
    rows: Sequence[int],
    g: Tensor | None = None,
    a: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes ``dX_i = dY_i·W_i + g_i·a_i`` for weights of one shape, each with rows of its own.

    Not differentiable: it is for use within an autograd function.

    Args:
        dy: ``[S, N]``, in the order of ``int4_expert_products``. weights, rows: as there.
        g: ``[S, R]``, LoRA's scaled ``dY_i·B_i``. a: ``[weights, R, K]``, LoRA's A of each.

    Returns:
        ``[S, K]`` in dy's dtype.
    """
    _check("dy", dy, weights[0].out_features, weights[0], backend)

    def one_by_one() -> Tensor:
        dx = dy.new_empty(dy.shape[0], weights[0].in_features)
        for weight, own_dy, own_dx, own_g, own_a in _by_expert(weights, rows, (dy, dx, g), a):
            own_dx.copy_(matmul_dx(own_dy, weight, own_g, own_a, backend))
        return dx

    def together(experts: Experts, route: TileConfig) -> Tensor:
        from .expert_products import int4_expert_products_dx_triton

        return int4_expert_products_dx_triton(dy, experts, rows, g, a, route)

    with no_autocast(dy):
        return _expert_products("matmul_dx", dy, weights, backend, one_by_one, together)


def _by_expert(
    weights: Sequence[Int4Weight], rows: Sequence[int], tensors: Sequence[Tensor | None], high: Tensor | None
) -> Iterator[tuple[Any, ...]]:
    """Each expert's weight, its rows of each of the ``tensors``, and its part of LoRA's high side; None is None."""
    parts = [[None] * len(weights) if tensor is None else tensor.split(list(rows)) for tensor in tensors]
    return zip(weights, *parts, [None] * len(weights) if high is None else high, strict=True)


def _expert_products(
    kernel: Kernel,
    operand: Tensor,
    weights: Sequence[Int4Weight],
    backend: str,
    one_by_one: Callable[[], Tensor],
    together: Callable[[Experts, TileConfig], Tensor],
) -> Tensor:
    """The products of experts in one launch where it can take them, and else one after the other."""
    if resolve_backend(backend, operand.device, operand.dtype) == "panel" or is_watched(operand):
        return one_by_one()
    from .expert_table import experts_of

    experts = experts_of(weights)
    if experts is None:
        return one_by_one()
    problem = experts.problem(kernel, operand.shape[0], operand.dtype)

    def launch(route: Route) -> Tensor:
        return one_by_one() if isinstance(route, Panel) else together(experts, route)

    return routed_over_experts(problem, operand.device, launch)


def _alike(weights: Sequence[Int4Weight]) -> bool:
    """Whether one launch can take these weights."""
    from .launch import can_group

    return can_group(weights)


def int4_embedding(ids: Tensor, weight: Int4Weight, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """Decodes rows ``ids`` (int64, any shape) of the table ``[V, K]``: ``[*ids.shape, K]``. Not differentiable."""
    return embedding_op(ids, *fields_of(weight), dtype, backend)


def int4_cross_entropy(
    hidden: Tensor,
    weight: Int4Weight,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    factors: Sequence[float] = (1.0,),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Computes the cross-entropy of each token over the int4 head, and the argmax; differentiable in ``hidden``.

    Args:
        hidden: ``[T, K]``. weight: ``[V, K]``. targets: ``[T]`` int64. bias: ``[V]``, frozen.
        factors: what the model does to its logits, as ``cross_entropy`` describes.

    Returns:
        losses ``[T]`` float32 or wider, 0 where ignored; argmax ``[T]`` int64, -1 where ignored.
    """
    _check("hidden", hidden, weight.in_features, weight, backend)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape {tuple(hidden.shape[:1])}, got {tuple(targets.shape)}")
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    fields, chain = fields_of(weight), list(factors)
    with no_autocast(hidden):
        losses, _, argmax = cross_entropy_op(hidden, *fields, targets, bias, ignore_index, chain, backend, need_grad)
    return losses, argmax


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError for integers, which modelling code makes that casts to ``layer.weight.dtype``."""
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} is {tensor.dtype}, wanted a floating dtype; if the model casts its activations to the dtype of an "
            f"int4 layer's weight, which is packed codes, that layer must stay float"
        )


def _check(name: str, tensor: Tensor, width: int, weight: Int4Weight, backend: str) -> None:
    check_floating(name, tensor)
    interpreted = backend == "triton" and tensor.device.type == "cpu" and not architecture_of(tensor.device)
    if interpreted and tensor.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: use float32 or float16, or backend 'panel'")
    if tensor.dim() == 0 or tensor.shape[-1] != width:
        raise ValueError(f"{name} must have {width} columns, got shape {tuple(tensor.shape)}")
    if tensor.device != weight.device:
        # A weight is on the meta device while its block does not run.
        raise ValueError(f"{name} is on {tensor.device} and the int4 weight on {weight.device}")
