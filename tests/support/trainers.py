"""Hugging Face's ``Trainer``, unchanged, on tiny models: rows to train on, a run that is cut short, and its log."""

from __future__ import annotations

import atexit
import functools
import gc
from pathlib import Path
from typing import Any

from models import batch
from transformers import Trainer, TrainerCallback, TrainingArguments


def rows(first: int, count: int) -> list[dict[str, Any]]:
    """Random examples; those of other numbers are others."""
    examples = [batch(rows=1, padding=None, seed=seed) for seed in range(first, first + count)]
    return [{name: tensor[0] for name, tensor in example.items()} for example in examples]


class Stop(TrainerCallback):
    """Ends a run within the step after ``step``, as a crash would, when that step's checkpoint is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self.step:
            raise InterruptedError


@functools.cache
def keep_libraries_out_of_collections() -> None:
    """Every run of ``Trainer`` collects garbage, and looking through the libraries' objects takes half of its time."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


def make_trainer(model: Any, output: Path, callbacks: Any = (), metrics: Any = None, **options: Any) -> Trainer:
    """A trainer of four steps, with a checkpoint after every second one; ``options`` are ``TrainingArguments``'."""
    keep_libraries_out_of_collections()
    settings: dict[str, Any] = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        "save_steps": 2,
        "seed": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(output_dir=str(output), **(settings | options))
    data = {"train_dataset": rows(0, 12), "eval_dataset": rows(12, 4)}
    return Trainer(model, arguments, compute_metrics=metrics, callbacks=list(callbacks), **data)


def history(job: Trainer, *names: str) -> list[float]:
    """The values that a run logged under ``names``, in order."""
    return [entry[name] for entry in job.state.log_history for name in names if name in entry]
