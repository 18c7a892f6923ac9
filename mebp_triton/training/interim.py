"""The evaluations during a training: when they are made, what is written of them, and which adapter is kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mebp_triton.models.adapter import save_adapter

from .evaluation import Evaluation
from .processes import Processes
from .run_directory import RunDirectory
from .run_settings import RunSettings
from .settings import EVALUATED
from .standing import Standing


class InterimEvaluations:
    """Makes the evaluations during a training, and keeps what came of them in the run directory.

    Args:
        model: the model that is trained.
        settings, run, processes: the trainer's.

    Attributes:
        identity: settings that identify the evaluated data; stored in ``run.json``.
        evaluate: makes an evaluation; None where none is asked for.
        on_evaluated: called with (steps taken, what was found, whether it is the best so far).
        last: the last evaluation that this process made, if any.
        seconds: what they took.
    """

    def __init__(self, model: Any, settings: RunSettings, run: RunDirectory, processes: Processes) -> None:
        self.model, self.settings, self.run, self.processes = model, settings, run, processes
        self.identity = {name: getattr(settings, name) for name in EVALUATED}
        self.evaluate: Callable[[], Evaluation] | None = None
        self.on_evaluated: Callable[[int, Evaluation, bool], None] = lambda step, found, best: None
        self.last: Evaluation | None = None
        self.seconds = 0.0

    def resume(self, standing: Standing) -> Standing:
        """Returns the standing with which a run goes on, and warns of what cannot be kept of the saved one."""
        if standing.best_step is not None and standing.of != self.identity:
            warnings.warn(
                "other data is evaluated than before, so the best evaluation so far is forgotten", stacklevel=3
            )
            return Standing(standing.evaluated_at)
        if self.settings.save_best and standing.best_step is not None and not standing.kept:
            warnings.warn(
                f"the adapter of the best evaluation so far, after step {standing.best_step}, was not kept: only that "
                "of a better one will be",
                stacklevel=3,
            )
        return standing

    def run_if_due(self, standing: Standing, step: int) -> bool:
        """Evaluates after every ``eval_steps`` steps, and keeps the adapter if it is the best; says whether it did.

        Raises:
            Interrupted: ``evaluate`` was interrupted; nothing is written then.
        """
        if self.evaluate is None or not standing.is_due(self.settings, step):
            return False
        started = time.perf_counter()
        self.last = found = self.evaluate()
        best = standing.take_in(step, found.loss, self.settings.early_stopping_threshold)
        standing.of = self.identity
        if best:
            standing.kept = self.settings.save_best
            if self.settings.save_best and self.processes.is_first:
                save_adapter(self.model, self.run.best)
                self.run.complete_best()
        row = {f"eval_{name}": value for name, value in asdict(found).items()}
        row["eval_seconds"] = seconds = time.perf_counter() - started
        self.seconds += seconds
        self.run.append_metrics({"step": step - 1} | row | {"best": best, "not_improved": standing.not_improved})
        self.on_evaluated(step, found, best)
        return True
