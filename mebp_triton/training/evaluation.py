"""Loss, perplexity and token accuracy of a model on a file's windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mebp_triton.data.batching import collate, evenly_spaced
from mebp_triton.data.tokenized import TokenizedData

if TYPE_CHECKING:
    from .processes import Processes

from mebp_triton.system.errors import RunError


@dataclass(frozen=True)
class Evaluation:
    """Means over ``tokens`` targets. ``loss`` in nats per token."""

    loss: float
    token_accuracy: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float | None:
        """None where it is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else None


def check_vocabulary(model: Any, data: TokenizedData, what: str) -> None:
    """ValueError where the tokenizer made ids that the model has no row for: it is another model's, or damaged."""
    size, highest = model.config.get_text_config().vocab_size, data.highest_id()
    if highest >= size:
        raise ValueError(
            f"{what} has the token id {highest}, and the model {size} tokens: its tokenizer belongs to another model"
        )


@torch.no_grad()
def evaluate(
    model: Any,
    data: TokenizedData,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes | None = None,
) -> Evaluation:
    """Over ``max_windows`` evenly spaced windows of ``data``, or all. The model's mode is put back afterwards.

    Each of several ``processes`` takes its part of the windows; all have the result.

    Raises:
        ValueError: there is no token to predict, or one that the model does not have.
        RunError: the loss is not finite.
    """
    check_vocabulary(model, data, "the evaluation data")
    places = evenly_spaced(data, max_windows)
    mine = places if processes is None else places[processes.rank :: processes.size]
    device = model.mebp.device
    training = model.training
    model.eval()
    loss, correct, tokens = 0.0, 0, 0
    try:
        for done, place in enumerate(mine):
            batch = collate([data[place]], pad_token_id=0)
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
            counted = model.mebp.loss.statistics
            loss += output.loss.item() * counted.tokens
            correct += counted.correct
            tokens += counted.tokens
            progress(done + 1, len(mine))
    finally:
        model.train(training)
    if processes is not None:
        loss, *counts = processes.sum(loss, correct, tokens)
        correct, tokens = map(int, counts)
    if tokens == 0:
        raise ValueError("the evaluation data has no token to predict")
    if not math.isfinite(loss):
        raise RunError(f"the evaluation loss is {loss}: compute in float32, or check the adapter")
    return Evaluation(loss / tokens, correct / tokens, tokens, len(places))
