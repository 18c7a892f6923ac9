"""One-pass cross-entropy over an int4 head: loss, its gradient and the argmax, with no logits stored.

The vocabulary is walked in tiles. Each tile gives logits ``z = H·W_tᵀ`` and updates the running maximum ``m``, the sum
``l = sum exp(z - m)`` and ``A = sum exp(z - m)·W_t``, which are rescaled when m moves, as in flash attention (arXiv
2205.14135); also the target's logit and the argmax. At the end ``loss = m + log l - z_target`` and
``dH = A / l - W[target]``. So a tile is decoded once for the loss and its gradient, and memory is ``[T, tile]``.

What a model does to its logits between the head and the loss is given as a chain of factors, with a tanh between
neighbours: ``[1.0]`` is nothing, ``[0.5]`` a scale, ``[1 / cap, cap]`` Gemma's soft-capping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layout import CHUNK, Int4Weight
from .native import native_matmul, native_matmul_dx, takes
from .panel import PanelDecoder, int4_embedding_panel, spans, whole_tiles
from .running_softmax import RunningSoftmax, apply_chain
from .workspace import workspace

# Rows of the head per tile in plain torch. With kernels a tile has as many rows as fit into a panel and into LOGITS.
VOCABULARY_TILE = 1024
LOGITS = 1 << 22


class OnePass:
    """The loss over a head whose rows come in parts: ``add`` each part in order, then ``finish``.

    Args:
        hidden: ``[T, K]``.
        targets: ``[T]`` int64; ``ignore_index`` marks a token without a target.
        bias: ``[V]``.
        factors: the chain that the module's docstring describes.
        need_grad: if false, the second product is left out, and the gradient is empty, ``[0, K]``.
        by_kernel: Triton kernels decode the panels and update the softmax.
    """

    def __init__(
        self,
        hidden: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        factors: Sequence[float] = (1.0,),
        need_grad: bool = True,
        by_kernel: bool = False,
    ) -> None:
        self.hidden, self.bias, self.factors = hidden, bias, factors
        self.need_grad, self.by_kernel = need_grad, by_kernel
        self.wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.valid = (targets != ignore_index).nonzero().squeeze(1)
        self.targets = targets[self.valid]
        self.softmax = RunningSoftmax(self.targets, self.wide, factors[0])
        self.valid_hidden = hidden if self.valid.shape[0] == hidden.shape[0] else hidden[self.valid]
        self.planes: Tensor | None = None
        self.restore: Callable[[Tensor, int], Tensor] | None = None
        self.weighted = torch.empty(0)

    def add(self, weight: Int4Weight, first: int = 0) -> None:
        """Takes in the head's next rows, ``weight`` being rows ``first`` and following."""
        rows, (vocabulary, _) = self.valid_hidden.shape[0], weight.shape
        if rows == 0:
            return
        chunks, panel = weight.chunks, workspace().elements(self.hidden.device)
        if self.by_kernel:
            tile = min(panel // (chunks * CHUNK), max(VOCABULARY_TILE, LOGITS // rows))
            tile = min(vocabulary, whole_tiles(tile))
        else:
            # A power of two, so that a head in segments has the same tiles as a whole one, and rounds alike.
            tile = 1 << (min(VOCABULARY_TILE, max(1, 4 * panel // (chunks * CHUNK))).bit_length() - 1)
            tile = min(vocabulary, tile)
        if not self.by_kernel and self.hidden.dtype == torch.float32 and takes(self.hidden):
            self._begin(self.valid_hidden, lambda weighted, width: weighted)
            for start, stop in spans(vocabulary, tile):
                part = weight.rows(start, stop)
                p, shrink = self._update(native_matmul(self.valid_hidden, [(part, None, None, None)])[0], first + start)
                if self.need_grad:
                    native_matmul_dx([p], [part], into=self.weighted.mul_(shrink))
            return
        decoder = PanelDecoder(weight, self.hidden.dtype, tile, chunks, self.by_kernel)
        planes = self._begin(decoder.arrange(self.valid_hidden, chunks), decoder.restore)
        for start, stop in spans(vocabulary, tile):
            head = decoder(start, stop, 0, chunks)
            p, shrink = self._update(planes @ head.t(), first + start)
            if not self.need_grad:
                continue
            if self.hidden.dtype == self.wide:
                self.weighted.mul_(shrink).addmm_(p, head)
            else:
                self.weighted.mul_(shrink).add_(p.to(self.hidden.dtype) @ head)

    def _begin(self, planes: Tensor, restore: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Keeps what the first rows bring: hidden states in the order of panels, and how to restore a product's."""
        if self.planes is None:
            self.planes, self.restore = planes, restore
            shape = planes.shape[0] if self.need_grad else 0, planes.shape[1]
            self.weighted = torch.zeros(shape, dtype=self.wide, device=planes.device)
        return self.planes

    def _update(self, z: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Updates the softmax by a tile's products ``z``, of the head's rows from ``start`` on.

        Returns what each row weighs in the gradient, ``[T, tile]``, and the factor for earlier sums, ``[T, 1]``.
        """
        slope, factors = None, self.factors
        if self.bias is not None or len(factors) > 1 or factors[0] != 1.0 or not self.by_kernel:
            z = z.to(self.wide)
            if self.bias is not None:
                z += self.bias[start : start + z.shape[1]].to(self.wide)
            z, slope = apply_chain(z, factors)
        if self.by_kernel:
            from .softmax_tile import update_softmax

            p, shrink = update_softmax(self.softmax, z, slope, start)
        else:
            p, shrink = self.softmax.update(z, slope, start)
        if not self.need_grad:
            return p, shrink
        if slope is not None:
            p = p.mul_(slope)
        elif factors[0] != 1.0:
            p = p.mul_(factors[0])
        return p, shrink

    def finish(self, targets_rows: Int4Weight) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what ``int4_cross_entropy_panel`` does, given ``targets_rows``, the head's rows ``self.targets``."""
        count, width = self.hidden.shape
        device, valid, softmax = self.hidden.device, self.valid, self.softmax
        losses = torch.zeros(count, dtype=self.wide, device=device)
        grad = torch.zeros(count if self.need_grad else 0, width, dtype=self.wide, device=device)
        best = torch.full((count,), -1, dtype=torch.int64, device=device)
        if self.planes is None:
            return losses, grad, best
        losses[valid] = (softmax.maximum + softmax.total.log() - softmax.at_target).squeeze(1)
        best[valid] = softmax.argmax.squeeze(1)
        if self.need_grad:
            self.weighted.div_(softmax.total)
            places = torch.arange(valid.shape[0], device=device)
            if self.by_kernel:
                from .embedding import int4_embedding_triton

                rows_of_targets = int4_embedding_triton(places, targets_rows, self.wide)
            else:
                rows_of_targets = int4_embedding_panel(places, targets_rows, self.wide)
            assert self.restore is not None
            grad[valid] = self.restore(self.weighted, width) - softmax.target_slope * rows_of_targets
        return losses, grad, best


def int4_cross_entropy_panel(
    hidden: Tensor,
    weight: Int4Weight,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    factors: Sequence[float] = (1.0,),
    need_grad: bool = True,
    by_kernel: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes each token's loss, its gradient with respect to that token's hidden state, and the argmax.

    Args:
        weight: ``[V, K]``, the head. ``OnePass`` describes the other arguments.

    Returns:
        losses ``[T]`` (float32, or float64 for float64 hidden states; 0 where ignored), ``d loss_t / d hidden_t``
        ``[T, K]`` in the same dtype, and argmax ``[T]`` int64 (-1 where ignored).
    """
    one_pass = OnePass(hidden, targets, bias, ignore_index, factors, need_grad, by_kernel)
    one_pass.add(weight)
    return one_pass.finish(weight.gather(one_pass.targets))
