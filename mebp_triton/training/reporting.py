"""Reports a run's numbers to experiment trackers, through transformers' own integrations.

They are callbacks of transformers' ``Trainer``. Here they get what they read of it: arguments, state and logs. Where
each one sends its data, and under which name, is set as everywhere: by environment variables such as
``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI`` and ``TENSORBOARD_LOGGING_DIR``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .evaluation import Evaluation
from .settings import TrainConfig
from .step import StepResult

# The packages of each integration, of which one must be installed; the first is the usual one.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}


def check_reporters(names: Sequence[str]) -> None:
    """Raises ValueError, with the command that installs it, where the package of a tracker is missing."""
    for name in names:
        packages = PACKAGES[name]
        if not any(importlib.util.find_spec(package) for package in packages):
            raise ValueError(f"report_to {name} needs the package {packages[0]}: pip install {packages[0]}")


class Arguments(SimpleNamespace):
    """The run's settings, as the integrations ask transformers' ``TrainingArguments`` for them."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def to_sanitized_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def arguments_of(settings: TrainConfig, directory: Path) -> Arguments:
    """The arguments for a run in ``directory``. TensorBoard's files go into ``runs/`` in it, as with ``Trainer``."""
    return Arguments(
        **asdict(settings)
        | {
            "output_dir": str(directory),
            "logging_dir": str(directory / "runs"),  # of transformers 4
            "run_name": os.path.basename(os.path.abspath(directory)),
            "project": "huggingface",  # of trackio, as in ``TrainingArguments``
            "trackio_space_id": None,
            "trackio_bucket_id": None,
            "trackio_static_space_id": False,
            "hub_private_repo": None,
            "load_best_model_at_end": False,
            "logging_steps": 1,
        }
    )


class Reports:
    """The trackers of a run. While the context is active, they take its numbers.

    Args:
        names: keys of ``PACKAGES``; none for no tracker.
        settings: the run's.
        directory: the run directory.
        model: its config is reported as well.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one pass over the data.

    Raises:
        ValueError: on entering, a tracker cannot start.
    """

    def __init__(
        self,
        names: Sequence[str],
        settings: TrainConfig,
        directory: Path,
        model: Any,
        total_steps: int,
        steps_per_epoch: float,
    ) -> None:
        self.names, self.model, self.steps_per_epoch = names, model, steps_per_epoch
        self.arguments = arguments_of(settings, directory)
        self.total_steps = total_steps
        self.callbacks: dict[str, Any] = {}

    def __enter__(self) -> Reports:
        if self.names:
            from transformers import TrainerControl, TrainerState
            from transformers.integrations import get_reporting_integration_callbacks

            self.state = TrainerState(max_steps=self.total_steps, logging_steps=1)
            self.control = TrainerControl()
        for name in self.names:
            try:
                (kind,) = get_reporting_integration_callbacks([name])
                callback = kind()
                self._call(callback, "on_train_begin")
            except Exception as error:  # whatever a tracker raises
                self.__exit__()
                problem = " ".join(str(error).split())[:300]
                raise ValueError(f"report_to {name} cannot start ({problem}): set it up, or leave it out") from None
            self.callbacks[name] = callback
        return self

    def __exit__(self, *_: object) -> None:
        self._all("on_train_end")
        self.callbacks.clear()

    def on_step(self, result: StepResult) -> None:
        """Reports a step, under the names that transformers and TRL give such numbers."""
        logs = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "mean_token_accuracy": result.token_accuracy,
            "tokens_per_second": result.tokens / max(result.seconds, 1e-9),
        }
        self._log(result.step + 1, logs)

    def on_evaluated(self, step: int, found: Evaluation) -> None:
        """Reports an evaluation after ``step`` steps."""
        logs = {"loss": found.loss, "mean_token_accuracy": found.token_accuracy, "perplexity": found.perplexity}
        self._log(step, {f"eval_{name}": value for name, value in logs.items()})

    def _log(self, step: int, logs: dict[str, float | None]) -> None:
        if self.callbacks:
            self.state.global_step, self.state.epoch = step, step / self.steps_per_epoch
            known = {name: value for name, value in logs.items() if value is not None}
            self._all("on_log", logs=known | {"epoch": self.state.epoch})

    def _all(self, event: str, **about: Any) -> None:
        """Calls all trackers. One that fails, by its network say, is left out from then on: the training goes on."""
        for name, callback in list(self.callbacks.items()):
            try:
                self._call(callback, event, **about)
            except Exception as error:  # whatever a tracker raises
                del self.callbacks[name]
                problem = " ".join(str(error).split())[:300]
                warnings.warn(f"{name} failed, and gets no more reports: {problem}", stacklevel=4)

    def _call(self, callback: Any, event: str, **about: Any) -> None:
        # Standard output is the command's answer, and some trackers print.
        with contextlib.redirect_stdout(sys.stderr):
            getattr(callback, event)(self.arguments, self.state, self.control, model=self.model, **about)
