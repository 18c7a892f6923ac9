"""The loss of a source on a text, in the memory of one block's float weights, or of the head in its own dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.running_softmax import RunningSoftmax, apply_chain
from mebp_triton.layers.deferred_logits import DeferredLogits
from mebp_triton.layers.head import Int4Head
from mebp_triton.layers.loss import OnePassLoss

from .source_run import SourceRun

PIECE_ELEMENTS = 1 << 22  # of the head's rows that are in float32 at a time


class FloatHead(nn.Module):
    """A language-model head ``[V, K]`` of any float dtype, some rows of which are in float32 at a time.

    Its forward pass defers the logits, and so the loss makes no more of them than it needs at a time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features = len(weight)

    def forward(self, x: Tensor) -> DeferredLogits:
        return DeferredLogits(x, self, (1.0,))

    def logits(self, x: Tensor) -> Tensor:
        """The logits ``[..., V]`` of hidden states ``[..., K]``."""
        return torch.cat([logits for _, logits in self._pieces(x)], -1)

    def cross_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        ignore_index: int,
        factors: tuple[float, ...],
        most_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses and argmax ``[T]`` of hidden states ``[T, K]``; see ``Head``."""
        softmax = RunningSoftmax(targets.clamp(min=0), torch.float32, factors[0])
        for start, logits in self._pieces(hidden):
            softmax.update(*apply_chain(logits, factors), start)
        losses = (softmax.maximum + softmax.total.log() - softmax.at_target).squeeze(1)
        return losses.masked_fill(targets == ignore_index, 0.0), softmax.argmax.squeeze(1)

    def _pieces(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The logits of some rows of the head after the other, each with the number of the first row."""
        step = max(1, PIECE_ELEMENTS // self.weight.shape[1])
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            bias = None if self.bias is None else self.bias[rows]
            yield start, nn.functional.linear(x, self.weight[rows].float(), bias)


class SourceLoss:
    """Scores the windows of ``run``, each once and in order, after all of them have gone through its blocks.

    Args:
        run: a source and its text, before the first block.
        progress: called with (blocks done, blocks in all).
    """

    def __init__(self, run: SourceRun, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.model, self._stream, self._window = run.model, run.stream, 0
        count = len(self._stream.runner.blocks)
        while self._stream.next < count:
            with run.block():
                self._stream.advance()
            progress(self._stream.next, count)
        self._loss = self.model.loss_function = OnePassLoss()
        self._place_head(run)

    def __call__(self, _: Any, batch: dict[str, Tensor]) -> tuple[float, int, int]:
        """The sum of the next window's losses, the tokens that were predicted right, and all that were predicted."""
        output = self._stream.output(self._window, labels=batch["labels"])
        self._window += 1
        counted = self._loss.statistics
        return output.loss.item() * counted.tokens, counted.correct, counted.tokens

    def _place_head(self, run: SourceRun) -> None:
        old = self.model.get_output_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is old)
        value = run.weights.stored(f"{name}.weight")
        bias = None if old.bias is None else run.weights.read(f"{name}.bias")
        head: Any
        if isinstance(value, Int4Weight):
            head = Int4Head(value, bias, torch.float32)
            head.deferred = True
        else:
            head = FloatHead(value, bias)
        owner, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(owner), attribute, head)
