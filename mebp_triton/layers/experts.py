"""The experts of a mixture over int4 weights: each token is computed by the experts that its router chose.

The rows of all chosen pairs of token and expert are sorted by expert, so that each expert has one product for its rows.
A token's results are added up in the order in which its router named the experts, so the sum is always the same one.

Where the weights come from, and when, is for whoever implements ``ExpertSource``: here alone it is known which experts
a pass needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mebp_triton.kernels.functions import int4_expert_products, int4_expert_products_dx, no_autocast
from mebp_triton.kernels.layout import Int4Weight

from .lora_function import autocast_input

# The weights of an expert: that of gate and up (or up alone) ``[I, H]``, and that of down ``[H, I]``.
ExpertWeights = tuple[Int4Weight, Int4Weight]


class ExpertSource(Protocol):
    """The weights of a module's experts, brought in when they are needed."""

    def bring(self, experts: Sequence[int]) -> list[ExpertWeights]:
        """Returns the weights of these experts, in place until the block is left."""
        ...


class _Call(NamedTuple):
    """What a call of the products knows besides tensors that have gradients."""

    weights: tuple[Int4Weight, ...]
    rows: list[int]
    backend: str


class _ExpertProducts(torch.autograd.Function):
    """``Y_i = X_i·W_iᵀ``, with ``dX_i = dY_i·W_i``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        return int4_expert_products(x, call.weights, call.rows, backend=call.backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        call: _Call = ctx.call
        return int4_expert_products_dx(dy.contiguous(), call.weights, call.rows, backend=call.backend), None


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


class Int4Experts(nn.Module):
    """Experts over int4 weights, in the place of a transformers module of the interface of ``models.experts``.

    ``replace_experts`` makes it of such a module, and keeps its gate, its activation and its biases.

    Attributes:
        source: where the weights come from.
        first: the name of the parameter that was the experts' first matrices.
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
            return (y * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)

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
        call = _Call(tuple([pair[which] for pair in weights]), routing.rows, self.backend)
        y = _ExpertProducts.apply(x, call)
        if self.has_bias:
            bias: Any = self._parameters[f"{(self.first, 'down_proj')[which]}_bias"]
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
