"""A softmax that is computed tile by tile (arXiv 1805.02867), and the chain of factors that logits go through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def apply_chain(z: Tensor, factors: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    """Applies a chain of factors with a tanh between neighbours to ``z``, in place.

    Returns the chain's value and its derivative, which is None where it is a constant (the first factor).
    """
    slope: Tensor | None = None
    constant = factors[0]
    if constant != 1.0:
        z = z.mul_(constant)
    for factor in factors[1:]:
        z = z.tanh_()
        step = (1 - z * z).mul_(constant * factor)
        slope = step if slope is None else slope.mul_(step)
        constant = 1.0
        z = z.mul_(factor)
    return z, slope


class RunningSoftmax:
    """The state of each row's softmax after some tiles of the vocabulary. Every tensor is ``[rows, 1]``.

    Attributes:
        targets: ``[rows]`` int64, each row's target.
        maximum, total: the largest logit so far, and ``sum exp(z - maximum)``.
        at_target, target_slope: the target's logit, and the chain's derivative there.
        argmax: the position of the first of the largest logits.
    """

    def __init__(self, targets: Tensor, wide: torch.dtype, slope: float) -> None:
        rows, device = targets.shape[0], targets.device
        self.targets = targets
        self.maximum = torch.full((rows, 1), float("-inf"), dtype=wide, device=device)
        self.total = torch.zeros(rows, 1, dtype=wide, device=device)
        self.at_target = torch.zeros(rows, 1, dtype=wide, device=device)
        self.target_slope = torch.full((rows, 1), slope, dtype=wide, device=device)
        self.argmax = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    def update(self, z: Tensor, slope: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        """Takes in the logits ``z`` ``[rows, tile]`` of the tile from row ``start`` of the head on.

        Returns:
            ``exp(z - maximum)``, in place of ``z``; and ``[rows, 1]``, what sums over earlier tiles must be multiplied
            by, because the maximum may have moved.
        """
        inside = ((self.targets >= start) & (self.targets < start + z.shape[1])).unsqueeze(1)
        index = (self.targets - start).clamp_(0, z.shape[1] - 1).unsqueeze(1)
        self.at_target = torch.where(inside, z.gather(1, index), self.at_target)
        if slope is not None:
            self.target_slope = torch.where(inside, slope.gather(1, index), self.target_slope)
        top, position = z.max(dim=1, keepdim=True)
        self.argmax = torch.where(top > self.maximum, position + start, self.argmax)
        moved = torch.maximum(self.maximum, top)
        shrink = (self.maximum - moved).exp_()
        self.maximum = moved
        p = z.sub_(moved).exp_()
        self.total.mul_(shrink).add_(p.sum(dim=1, keepdim=True))
        return p, shrink
