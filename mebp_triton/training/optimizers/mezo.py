"""MeZO (arXiv 2305.17333): a step by two forward passes and no backward pass, the baseline for true gradients.

The direction is drawn from a seed, and drawn again where it is needed instead of being kept. So a step takes the memory
of a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


class MeZO:
    """SGD along the projected gradient ``(L(p + eps·z) - L(p - eps·z)) / (2·eps) · z``, with a normal ``z``.

    Args:
        parameters: those that are perturbed and trained.
        epsilon: the step of the finite difference.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], epsilon: float = 1e-3, weight_decay: float = 0.0) -> None:
        if not epsilon > 0:
            raise ValueError(f"mezo epsilon must be positive, got {epsilon!r}")
        self.parameters, self.epsilon, self.weight_decay = list(parameters), epsilon, weight_decay

    @torch.no_grad()
    def _move(self, seed: int, scale: float) -> None:
        """Adds ``scale·z`` to the parameters, with the ``z`` of ``seed``."""
        generators: dict[torch.device, torch.Generator] = {}
        for parameter in self.parameters:
            device = parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            z = torch.randn(parameter.shape, generator=generators[device], device=device, dtype=parameter.dtype)
            parameter.add_(z, alpha=scale)

    @torch.no_grad()
    def step(self, loss: Callable[[], float], lr: float, seed: int) -> tuple[float, float]:
        """Takes one step.

        Args:
            loss: runs the forward pass; it must draw the same dropout both times.
            lr: the learning rate.
            seed: seeds the direction.

        Returns:
            The mean of the two losses, and the projected gradient.
        """
        losses = []
        for sign in (1, -1):
            self._move(seed, sign * self.epsilon)
            try:
                losses.append(loss())
            finally:  # also if the loss raises: the parameters must not stay moved
                self._move(seed, -sign * self.epsilon)
        plus, minus = losses
        projected = (plus - minus) / (2 * self.epsilon)
        if self.weight_decay:
            for parameter in self.parameters:
                parameter.mul_(1 - lr * self.weight_decay)
        self._move(seed, -lr * projected)
        return (plus + minus) / 2, projected
