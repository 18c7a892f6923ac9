"""The experts of a mixture over int4 weights: each token is computed by the experts that its router chose.

The rows of all chosen pairs of token and expert are sorted by expert, so that each expert has one product for its rows.
A token's results are added up in the order in which its router named the experts, so the sum is always the same one.

Where the weights come from, and when, is for whoever implements ``ExpertSource``: here alone it is known which experts
a pass needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mebp_triton.kernels.functions import int4_expert_products, int4_expert_products_dx, no_autocast
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.token_products import lora_a_gradient, lora_b_gradients

from .lora_function import autocast_input

# The weights of an expert: that of gate and up (or up alone) ``[I, H]``, and that of down ``[H, I]``.
ExpertWeights = tuple[Int4Weight, Int4Weight]


class ExpertSource(Protocol):
    """The weights of a module's experts, brought in when they are needed."""

    def bring(self, experts: Sequence[int]) -> list[ExpertWeights]:
        """Returns the weights of these experts, in place until the block is left."""
        ...


class _Call(NamedTuple):
    """What a call of the products knows besides tensors that have gradients.

    ``total`` is the number of all experts; ``scaling`` is that of the adapters, if there are any.
    """

    weights: tuple[Int4Weight, ...]
    experts: list[int]
    rows: list[int]
    total: int
    backend: str
    scaling: float


class _ExpertProducts(torch.autograd.Function):
    """``Y_i = X_i·W_iᵀ + s·(X_i·A_iᵀ)·B_iᵀ``, with ``dX_i = dY_i·W_i + g_i·A_i``, ``g_i = s·dY_i·B_i``.

    The adapters of all experts are one tensor each, see ``ExpertAdapter``; both are None without adapters. Their
    gradients are zero for experts that no token was routed to.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, call: _Call) -> Tensor:
        ctx.call = call
        if lora_a is None or lora_b is None:
            return int4_expert_products(x, call.weights, call.rows, backend=call.backend)
        a, b = _chosen(lora_a, lora_b, call, x.dtype)
        t = _by_expert(x, a.transpose(1, 2), call)
        ctx.save_for_backward(x, t, a, b)
        ctx.likes = lora_a, lora_b
        return int4_expert_products(x, call.weights, call.rows, t, b, call.backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: _Call = ctx.call
        saved, dy = ctx.saved_tensors, dy.contiguous()
        with no_autocast(dy):
            if not saved:
                return int4_expert_products_dx(dy, call.weights, call.rows, backend=call.backend), None, None, None
            x, t, a, b = saved
            g = _by_expert(dy, b, call)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = int4_expert_products_dx(dy, call.weights, call.rows, g, a, call.backend)
            return dx, *_adapter_gradients(ctx, (x, t, dy, g)), None


def _chosen(lora_a: Tensor, lora_b: Tensor, call: _Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The adapters of the experts of a call: A ``[chosen, R, K]`` and B ``[chosen, N, R]``."""
    chosen = torch.tensor(call.experts, device=lora_a.device)
    a = lora_a.view(call.total, -1, lora_a.shape[1]).index_select(0, chosen)
    b = lora_b.view(lora_b.shape[0], -1, call.total).index_select(2, chosen).permute(2, 0, 1)
    return a.to(dtype), b.to(dtype).contiguous()


def _by_expert(x: Tensor, factors: Tensor, call: _Call) -> Tensor:
    """Each expert's rows of x ``[S, C]`` times its factor ``[C, R]``, scaled: ``[S, R]``."""
    made = x.new_empty(x.shape[0], factors.shape[2])
    for given, part, factor in zip(x.split(call.rows), made.split(call.rows), factors, strict=True):
        part.addmm_(given, factor, beta=0, alpha=call.scaling)
    return made


def _adapter_gradients(ctx: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the adapters of all experts, from x, t, dY and g, each ``[S, ...]``."""
    call: _Call = ctx.call
    like_a, like_b = ctx.likes
    da = torch.zeros_like(like_a) if ctx.needs_input_grad[1] else None
    db = torch.zeros_like(like_b) if ctx.needs_input_grad[2] else None
    parts = zip(*(tensor.split(call.rows) for tensor in tensors), strict=True)
    for expert, (x, t, dy, g) in zip(call.experts, parts, strict=True):
        if da is not None:
            da.view(call.total, -1, da.shape[1])[expert] = lora_a_gradient(g, x, da.dtype, call.backend)
        if db is not None:
            db.view(db.shape[0], -1, call.total)[:, :, expert] = lora_b_gradients([dy], [t], db.dtype, call.backend)[0]
    return da, db


class _Sorted(torch.autograd.Function):
    """The rows of x by expert, each as often as its token has experts.

    Autograd's own gradient would add into a tensor of zeros, in any order on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return x[routing.order // routing.per_token]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        routing: Routing = ctx.routing
        return dy[routing.places].unflatten(0, (-1, routing.per_token)).sum(1), None


class _BackInPlace(torch.autograd.Function):
    """The sorted rows in the order of tokens again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return y[routing.places]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy[ctx.routing.order], None


class Routing(NamedTuple):
    """Which rows each expert computes.

    Attributes:
        experts: the experts that were chosen, in ascending order. rows: how many rows each of them has.
        order: ``[S]`` int64, the pair of token and choice that each sorted row is. places: the inverse.
        ids: ``[S]`` int64, the expert of each sorted row.
        per_token: how many experts a token has.
    """

    experts: list[int]
    rows: list[int]
    order: Tensor
    places: Tensor
    ids: Tensor
    per_token: int


class ExpertAdapter(nn.Module):
    """The LoRA adapters of all experts for one of their matrices, in the layout of PEFT's ``target_parameters``.

    ``lora_A`` is ``[experts * R, K]``, one expert's rows below another's. ``lora_B`` is ``[N, R * experts]``: column
    ``j * experts + e`` is column j of expert e.

    Attributes:
        nested: whether PEFT has it inside of the adapter of the experts' other matrix.
    """

    def __init__(
        self,
        experts: int,
        shape: tuple[int, int],
        rank: int,
        scaling: float,
        nested: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draws the initial values as PEFT does; ``shape`` is the out and in features of a matrix."""
        super().__init__()
        self.experts, self.rank, self.scaling, self.nested = experts, rank, scaling, nested
        bound = 1 / math.sqrt(shape[1])
        a = torch.empty(experts * rank, shape[1]).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(shape[0], rank * experts, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"experts={self.experts}, r={self.rank}"


class Int4Experts(nn.Module):
    """Experts over int4 weights, in the place of a transformers module of the interface of ``models.experts``.

    ``replace_experts`` makes it of such a module, and keeps its gate, its activation and its biases.

    Attributes:
        source: where the weights come from.
        first: the name of the parameter that was the experts' first matrices.

    A submodule by the name of such a parameter is the adapter of these matrices.
    """

    source: ExpertSource
    first: str
    backend: str
    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes the weighted sum of each token's experts.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: ``[T, k]`` int64, the experts of each token. top_k_weights: ``[T, k]``, their weights.

        Returns:
            ``[T, H]`` in the dtype of ``hidden_states``.
        """
        x = autocast_input(hidden_states)
        if not top_k_index.numel():
            return hidden_states * 0
        routing = self.route(top_k_index)
        weights = self.source.bring(routing.experts)
        with no_autocast(x):
            y = self._product(0, _Sorted.apply(x, routing), weights, routing)
            y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
            y = self._product(1, y, weights, routing)
            if self.has_post_expert_norm:
                y = self.post_expert_norm(y)
            y = _BackInPlace.apply(y, routing).unflatten(0, (-1, routing.per_token))
            return (y * top_k_weights.reshape(-1, routing.per_token, 1)).sum(1).to(hidden_states.dtype)

    def route(self, index: Tensor) -> Routing:
        """Sorts the pairs of token and expert by expert. The host waits for the device here."""
        flat = index.reshape(-1)
        ids, order = flat.sort(stable=True)
        counts = self.count(flat)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        experts = [expert for expert, count in enumerate(counts) if count]
        return Routing(experts, [counts[expert] for expert in experts], order, places, ids, index.shape[-1])

    def count(self, ids: Tensor) -> list[int]:
        """How many rows each expert has."""
        return torch.bincount(ids, minlength=self.num_experts).tolist()

    def _product(self, which: int, x: Tensor, weights: list[ExpertWeights], routing: Routing) -> Tensor:
        """The experts' first or second products ``[S, N]``, biases added, of their sorted rows x ``[S, K]``."""
        name = (self.first, "down_proj")[which]
        adapter: Any = self._modules.get(name)
        scaling = 1.0 if adapter is None else adapter.scaling
        own = tuple([pair[which] for pair in weights])
        call = _Call(own, routing.experts, routing.rows, self.num_experts, self.backend, scaling)
        a, b = (None, None) if adapter is None else (adapter.lora_A, adapter.lora_B)
        y = _ExpertProducts.apply(x, a, b, call)
        if self.has_bias:
            bias: Any = self._parameters[f"{name}_bias"]
            y = y + bias[routing.ids].to(y.dtype)
        return y


def replace_experts(module: nn.Module, first: str, source: ExpertSource, backend: str) -> Int4Experts:
    """Turns ``module`` into ``Int4Experts`` in place.

    Args:
        module: follows the interface of ``models.experts``; its parameters may be on the meta device.
        first: the name of the parameter with the experts' first matrices.
        source, backend: see ``Int4Experts``.
    """
    kind = type(module)
    for name in (first, "down_proj"):
        del module._parameters[name]
    module.__class__ = type(f"Int4{kind.__name__}", (Int4Experts, kind), {})
    assert isinstance(module, Int4Experts)
    module.source, module.first, module.backend = source, first, backend
    return module
