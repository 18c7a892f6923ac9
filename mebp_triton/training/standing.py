"""The standing of a run among its own evaluations: which was the best, and how many in a row were no better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .settings import TrainConfig


@dataclass
class Standing:
    """The result of the evaluations during the training so far; a checkpoint keeps it.

    Attributes:
        evaluated_at: the steps taken at the last evaluation; 0 before the first.
        best_step, best_loss: the steps taken at the best evaluation, and its loss; None before the first.
        not_improved: the evaluations in a row whose loss was not lower than the best one before them, by more than
            ``early_stopping_threshold``.
        kept: whether ``adapter_best/`` holds the adapter of the best one.
        of: the settings that say what was evaluated; other losses cannot be compared with these.
    """

    evaluated_at: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    not_improved: int = 0
    kept: bool = False
    of: dict[str, Any] | None = None

    def is_due(self, settings: TrainConfig, step: int) -> bool:
        """Whether to evaluate now, after ``step`` steps."""
        return settings.eval_steps > 0 and step > self.evaluated_at and step % settings.eval_steps == 0

    def take_in(self, step: int, loss: float, threshold: float) -> bool:
        """Counts an evaluation, as transformers' ``EarlyStoppingCallback`` does; returns whether it is the best."""
        self.evaluated_at = step
        better = self.best_loss is None or loss < self.best_loss
        enough = self.best_loss is None or self.best_loss - loss > threshold
        self.not_improved = 0 if enough else self.not_improved + 1
        if better:
            self.best_step, self.best_loss = step, loss
        return better

    def is_over(self, settings: TrainConfig) -> bool:
        """Whether the training should end, since it has not improved for long enough."""
        return settings.early_stopping_patience is not None and self.not_improved >= settings.early_stopping_patience
