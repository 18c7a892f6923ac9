"""The inputs of the experts' matrices, which are no modules of their own and cannot be watched as these are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from mebp_triton.models.experts import FusedExperts


def expert_inputs(
    module: Any, experts: FusedExperts, hidden_states: Tensor, top_k_index: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yields the names of the matrices of experts that tokens are routed to, each with what it reads.

    Args:
        module: the float module of these experts.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, k]``, the experts of each token.

    Yields:
        The matrix's name in a store, and its inputs ``[tokens, in]``.
    """
    first, second = experts.shapes
    for expert in top_k_index.unique().tolist():
        x = hidden_states[(top_k_index == expert).nonzero()[:, 0]]
        yield experts.matrix(expert, first), x
        weight: Tensor = getattr(module, first)[expert]
        y = x @ (weight if experts.transposed else weight.t())
        if module.has_bias:
            y = y + getattr(module, f"{first}_bias")[expert]
        yield experts.matrix(expert, second), module._apply_gate(y) if module.has_gate else module.act_fn(y)
