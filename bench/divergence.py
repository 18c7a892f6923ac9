"""Perplexity of a causal language model over texts, and how far it is from its source model: KL divergence and top-1.

The head takes most of the time, and it runs once for each quantized model. With the source's probabilities p and the
other model's hidden state h, logits z = h·Eᵀ and their log-sum-exp, a position's divergence is

    Σ p·log p - Σ p·z + logsumexp(z),   where   Σ p·z = h·(p·E).

The first sum is the source's alone. So is p·E, as long as the head's matrix E is the source's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROWS = 128  # positions whose logits are in memory at a time


def windows(tokenizer: Any, text: str, count: int, length: int) -> list[Tensor]:
    """The first ``count`` windows of ``length`` tokens of a text, ``[1, 1 + length]`` each with a BOS before it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < count * length:
        raise ValueError(f"the text has {len(ids)} tokens, {count} windows of {length} need more")
    return [
        torch.tensor([[tokenizer.bos_token_id, *ids[start : start + length]]])
        for start in range(0, count * length, length)
    ]


@torch.no_grad()
def hidden_states(model: Any, texts: list[Tensor], every: int) -> Tensor:
    """The head's inputs at every ``every``-th position that has a next token, ``[T, d]`` float32."""
    return torch.cat([model.base_model(text).last_hidden_state[0, :-1:every] for text in texts])


@torch.no_grad()
def check_head(model: Any, text: Tensor) -> None:
    """Raises ValueError where logits are more than a product of hidden state and head, as with soft-capping."""
    ids = text[:, :16]
    hidden = model.base_model(ids).last_hidden_state
    plain = hidden @ model.get_output_embeddings().weight.t()
    if not torch.allclose(model(ids).logits, plain, rtol=1e-3, atol=1e-3):
        raise ValueError(f"{type(model).__name__} changes its logits after the head, which this script does not")


def _pieces(hidden: Tensor, head: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some positions at a time: which, their logits, and their probabilities."""
    for start in range(0, len(hidden), ROWS):
        logits = hidden[start : start + ROWS] @ head.t()
        yield slice(start, start + len(logits)), logits, logits.softmax(-1)


def _log_sum_exp(logits: Tensor, probabilities: Tensor, best: Tensor) -> Tensor:
    """Computed in float64 from the likeliest token, because the largest probability has lost the fewest bits."""
    best = best[:, None]
    return (logits.gather(1, best).double() - probabilities.gather(1, best).double().log())[:, 0]


@dataclass
class Reference:
    """The source model on one text.

    Attributes:
        texts: its windows.
        every: one position of so many is evaluated.
        hidden: see ``hidden_states``.
        head: the head's matrix, ``[V, d]`` float32.
        negative_entropy, best, means: Σ p·log p, the likeliest token and p·E of each position.
        loss: the source's own mean loss, natural logarithm.
    """

    texts: list[Tensor]
    every: int
    hidden: Tensor
    head: Tensor
    negative_entropy: Tensor = field(init=False)
    best: Tensor = field(init=False)
    means: Tensor = field(init=False)
    loss: float = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.hidden)
        self.negative_entropy = torch.empty(count, dtype=torch.float64)
        self.best, self.means = torch.empty(count, dtype=torch.int64), torch.empty_like(self.hidden)
        sums = torch.empty(count, dtype=torch.float64)
        for rows, logits, probabilities in _pieces(self.hidden, self.head):
            self.best[rows] = logits.argmax(-1)
            self.means[rows] = probabilities @ self.head
            sums[rows] = _log_sum_exp(logits, probabilities, self.best[rows])
        self.negative_entropy = _dots(self.hidden, self.means) - sums
        self.loss = float((sums - self._of_targets(self.hidden, self.head)).mean())

    def _of_targets(self, hidden: Tensor, head: Tensor) -> Tensor:
        """The logit of each position's next token, float64."""
        return _dots(hidden, head[torch.cat([text[0, 1 :: self.every] for text in self.texts])])

    @torch.no_grad()
    def compare(self, model: Any) -> dict[str, float]:
        """Perplexity, mean KL divergence from the source in nats, and how often the likeliest token is the same."""
        head, hidden = model.get_output_embeddings().weight, hidden_states(model, self.texts, self.every)
        means = self.means if torch.equal(head, self.head) else self._means(head)
        sums, same = torch.empty(len(hidden), dtype=torch.float64), 0
        for rows, logits, probabilities in _pieces(hidden, head):
            best = logits.argmax(-1)
            sums[rows] = _log_sum_exp(logits, probabilities, best)
            same += int((best == self.best[rows]).sum())
        loss = float((sums - self._of_targets(hidden, head)).mean())
        divergence = float((self.negative_entropy - _dots(hidden, means) + sums).mean())
        return {"perplexity": math.exp(loss), "kl": divergence, "top1": same / len(hidden)}

    def _means(self, head: Tensor) -> Tensor:
        pieces = _pieces(self.hidden, self.head)
        return torch.cat([probabilities @ head for _, _, probabilities in pieces])


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """The dot product of each row, float64."""
    return (left.double() * right.double()).sum(-1)
