"""Loss, perplexity and token accuracy of a model on a file's windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mebp_triton.data.batching import collate, evenly_spaced
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.models.config import check_vocabulary
from mebp_triton.system.errors import RunError

from .processes import ALONE, Processes


@dataclass(frozen=True)
class Evaluation:
    """The mean over ``tokens`` predicted tokens of ``windows`` windows; ``loss`` is in nats per token."""

    loss: float
    token_accuracy: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float | None:
        """None where it is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else None


WindowScore = tuple[float, int, int]  # of one window: the sum of its losses, tokens predicted right, tokens predicted


def int4_score(model: Any, batch: dict[str, Tensor]) -> WindowScore:
    """Scores a window by the statistics of this package's loss, which makes no logits."""
    device = model.mebp.device
    output = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
    counted = model.mebp.loss.statistics
    return output.loss.item() * counted.tokens, counted.correct, counted.tokens


def plain_score(model: Any, batch: dict[str, Tensor]) -> WindowScore:
    """Scores a window by the loss and logits of any transformers model."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    output = model(**batch)
    targets = batch["labels"][:, 1:]
    valid = targets != -100
    tokens = int(valid.sum())
    return output.loss.item() * tokens, int(((output.logits[:, :-1].argmax(-1) == targets) & valid).sum()), tokens


@torch.no_grad()
def evaluate(
    model: Any,
    data: TokenizedData,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = ALONE,
    score: Callable[[Any, dict[str, Tensor]], WindowScore] = int4_score,
    widths: tuple[int, int] | None = None,
) -> Evaluation:
    """The loss and accuracy over evenly spaced windows of ``data``. The model's mode is put back afterwards.

    Args:
        max_windows: how many windows; all by default.
        progress: called with (windows done, windows in all).
        processes: each takes its part of the windows, and all return the whole result.
        score: scores one window, given as ``[1, tokens]`` tensors on the CPU.
        widths: pads windows so that few widths occur, see ``collate``: where blocks are graphs, each needs its own.

    Raises:
        ValueError: there is no token to predict, or one that the model does not have.
        RunError: the loss is not finite.
    """
    check_vocabulary(model.config, data, "the evaluation data")
    places = evenly_spaced(data, max_windows)
    mine = places[processes.rank :: processes.size]
    was_training = model.training
    model.eval()
    loss, correct, tokens = 0.0, 0, 0
    try:
        for done, place in enumerate(mine):
            window = score(model, collate([data[place]], pad_token_id=0, widths=widths))
            loss, correct, tokens = loss + window[0], correct + window[1], tokens + window[2]
            progress(done + 1, len(mine))
    finally:
        model.train(was_training)
    loss, *counts = processes.sum(loss, correct, tokens)
    correct, tokens = map(int, counts)
    if tokens == 0:
        raise ValueError("the evaluation data has no token to predict")
    if not math.isfinite(loss):
        raise RunError(f"the evaluation loss is {loss}: compute in float32, or check the adapter")
    return Evaluation(loss / tokens, correct / tokens, tokens, len(places))
