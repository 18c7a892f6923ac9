"""The inputs of linear layers on a text, as sums of the products of their columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Columns(NamedTuple):
    """The knowledge of a matrix's columns when it is rounded: arguments of ``quantize_matrix``, or None."""

    importance: Tensor | None = None
    factor: Tensor | None = None


class LayerInputs:
    """The inputs ``[tokens, K]`` of the layers that read the same ones.

    Args:
        columns: K.
        whole: whether every pair of columns has its product, or each column its square alone.

    Attributes:
        sums: the sums over all inputs, float32: of all products ``[K, K]``, or of the squares ``[K]``.
        tokens: how many inputs there were.
    """

    def __init__(self, columns: int, whole: bool = True) -> None:
        self.sums = torch.zeros((columns, columns) if whole else columns)
        self.tokens = 0

    @property
    def whole(self) -> bool:
        return self.sums.dim() == 2

    def add(self, inputs: Tensor) -> None:
        """Takes in inputs ``[..., K]``."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(rows)
        if self.whole:
            self.sums.addmm_(rows.t(), rows)
        else:
            self.sums += rows.square().sum(0)

    def squares(self) -> Tensor:
        """The sums of the squares alone, ``[K]``."""
        return self.sums.diagonal().contiguous() if self.whole else self.sums

    def output_error(self, exact: Tensor, rounded: Tensor) -> float:
        """The relative change of what a layer gives: ``tr(D H Dᵀ) / tr(W H Wᵀ)`` with ``D`` the change of ``W``.

        It is 0 where the layer gives only zeros. Without the products of pairs, columns count as uncorrelated.

        Args:
            exact, rounded: the weight ``[N, K]`` before and after, float32.
        """

        def square(weight: Tensor) -> float:
            moved = weight @ self.sums if self.whole else weight * self.sums
            return float((moved * weight).sum(dtype=torch.float64))

        total = square(exact)
        return square(rounded - exact) / total if total > 0 else 0.0
