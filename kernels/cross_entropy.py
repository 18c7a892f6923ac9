"""One-pass cross-entropy over an int4 head: loss, its gradient and the argmax, with no logits stored.

The vocabulary is walked in tiles. Per tile: logits ``z = H·W_tᵀ``, the running maximum ``m``, the running sum
``l = sum exp(z - m)`` and ``A = sum exp(z - m)·W_t`` (rescaled when m moves, as in flash attention), the target's
logit and the running argmax. At the end ``loss = m + log l - z_target`` and ``dH = A / l - W[target]``.
Each tile is decoded once; memory is ``[T, tile]``.

What a model does to its logits between the head and the loss is a chain of factors with a tanh between two
neighbours: ``[1.0]`` nothing, ``[0.5]`` a scale, ``[1 / cap, cap]`` Gemma's soft-capping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import RUN, Int4Weight
from .panel import CHUNK, PanelDecoder, from_planes, int4_embedding_panel, panel_elements, spans, to_planes

VOCABULARY_TILE = 1024


def apply_chain(z: Tensor, factors: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    """The chain's value, in place of ``z``, and its derivative (None where it is a constant)."""
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


def int4_cross_entropy_panel(
    hidden: Tensor,
    weight: Int4Weight,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    factors: Sequence[float] = (1.0,),
    need_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per token, its gradient to that token's hidden state, and the argmax.

    Args:
        hidden: ``[T, K]``.
        weight: ``[V, K]``, the head.
        targets: ``[T]`` int64; ``ignore_index`` marks a token without a target.
        bias: ``[V]``.
        factors: see the module's docstring.
        need_grad: without it the second matmul is left out and the gradient is empty, ``[0, K]``.

    Returns:
        losses ``[T]`` (float32, or float64 for float64 hidden states; 0 where ignored), ``d loss_t / d hidden_t``
        ``[T, K]`` in the same dtype, argmax ``[T]`` int64 (-1 where ignored).
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    count, width = hidden.shape
    losses = torch.zeros(count, dtype=wide, device=hidden.device)
    grad = torch.zeros(count if need_grad else 0, width, dtype=wide, device=hidden.device)
    best = torch.full((count,), -1, dtype=torch.int64, device=hidden.device)
    valid = (targets != ignore_index).nonzero().squeeze(1)
    if valid.numel() == 0:
        return losses, grad, best
    targets = targets[valid]
    vocabulary, chunks = weight.out_features, weight.packed.shape[1] // RUN
    tile = min(vocabulary, VOCABULARY_TILE, max(1, 4 * panel_elements(hidden.device) // (chunks * CHUNK)))
    decoder = PanelDecoder(weight, hidden.dtype, tile, chunks)
    planes = to_planes(hidden[valid], chunks)
    rows = valid.shape[0]
    maximum = torch.full((rows, 1), float("-inf"), dtype=wide, device=hidden.device)
    total = torch.zeros(rows, 1, dtype=wide, device=hidden.device)
    at_target = torch.zeros(rows, 1, dtype=wide, device=hidden.device)
    target_slope = torch.full((rows, 1), factors[0], dtype=wide, device=hidden.device)
    argmax = torch.zeros(rows, 1, dtype=torch.int64, device=hidden.device)
    weighted = torch.zeros(rows if need_grad else 0, chunks * CHUNK, dtype=wide, device=hidden.device)

    for start, stop in spans(vocabulary, tile):
        panel = decoder(start, stop, 0, chunks)
        z = (planes @ panel.t()).to(wide)
        if bias is not None:
            z += bias[start:stop].to(wide)
        z, slope = apply_chain(z, factors)
        inside = ((targets >= start) & (targets < stop)).unsqueeze(1)
        index = (targets - start).clamp_(0, stop - start - 1).unsqueeze(1)
        at_target = torch.where(inside, z.gather(1, index), at_target)
        if slope is not None:
            target_slope = torch.where(inside, slope.gather(1, index), target_slope)
        top, position = z.max(dim=1, keepdim=True)
        argmax = torch.where(top > maximum, position + start, argmax)
        moved = torch.maximum(maximum, top)
        shrink = (maximum - moved).exp_()
        maximum = moved
        p = z.sub_(moved).exp_()
        total.mul_(shrink).add_(p.sum(dim=1, keepdim=True))
        if need_grad:
            p = p.mul_(factors[0]) if slope is None else p.mul_(slope)
            if hidden.dtype == wide:
                weighted.mul_(shrink).addmm_(p, panel)
            else:
                weighted.mul_(shrink).add_(p.to(hidden.dtype) @ panel)

    losses[valid] = (maximum + total.log() - at_target).squeeze(1)
    best[valid] = argmax.squeeze(1)
    if need_grad:
        weighted.div_(total)
        grad[valid] = from_planes(weighted)[:, :width] - target_slope * int4_embedding_panel(targets, weight, wide)
    return losses, grad, best
