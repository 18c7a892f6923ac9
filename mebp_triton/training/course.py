"""The steps of a run: their number, and whether a run that was planned shorter or longer may go on as this one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from mebp_triton.data.batching import batches, collate, of_like_length
from mebp_triton.data.tokenized import TokenizedData

from .optimizers.schedules import learning_rate
from .processes import Processes
from .settings import TrainConfig

# Where blocks are graphs, rows have at most so many widths, multiples of so many tokens: each width needs graphs of its
# own, and of those that like blocks share only some are kept (``blocks.graphs``).
MOST_WIDTHS, WIDTH = 8, 64
LENGTHS = ("max_steps", "num_train_epochs")  # the settings that say how long a run is


def row_widths(settings: TrainConfig) -> tuple[int, int] | None:
    """Returns the ``widths`` to which ``collate`` pads rows; None where each batch has the width of its longest row."""
    width = WIDTH * math.ceil(settings.max_length / (MOST_WIDTHS * WIDTH))
    return (width, settings.max_length) if settings.block_graphs else None


@dataclass(frozen=True)
class Course:
    """The batches from which a run's steps are made.

    Attributes:
        batches_per_epoch: batches of one pass over the data.
        per_step: batches of one optimizer step, of all processes together.
    """

    batches_per_epoch: int
    per_step: int

    def total_steps(self, settings: TrainConfig) -> int:
        """Returns the optimizer steps of the whole run."""
        return settings.max_steps or math.ceil(settings.num_train_epochs * self.batches_per_epoch / self.per_step)

    def rate(self, settings: TrainConfig, step: int) -> float:
        """Returns the learning rate of ``step``, from 0."""
        kind, warmup = settings.lr_scheduler_type, settings.warmup_steps
        return learning_rate(step, settings.learning_rate, kind, warmup, self.total_steps(settings))

    def micro_batches(
        self,
        data: TokenizedData,
        settings: TrainConfig,
        step: int,
        processes: Processes,
        pad_token_id: int,
        are_joined: Callable[[], bool] = lambda: False,
    ) -> Iterator[list[dict[str, Tensor]]]:
        """Yields the micro-batches of ``step`` and of each later one: this process's, every ``size``-th of all.

        Args:
            are_joined: asked at each step whether its micro-batches are to be one, or a few if lengths differ much.
        """
        epochs = None if settings.max_steps else settings.num_train_epochs
        size = settings.per_device_train_batch_size
        widths = row_widths(settings)
        stream = batches(data, size, settings.seed, start_batch=step * self.per_step, epochs=epochs)
        while True:
            own = list(islice(islice(stream, self.per_step), processes.rank, None, processes.size))
            if are_joined():
                own = of_like_length([example for batch in own for example in batch], most=len(own))
            yield [collate(examples, pad_token_id, widths=widths) for examples in own]

    def check_same_steps(self, before: TrainConfig, now: TrainConfig, step: int, run: Path) -> None:
        """Checks that the first ``step`` steps are the same ones by both settings, which differ in length alone.

        Args:
            run: the run directory, from whose adapter a new run could begin.

        Raises:
            ValueError: they are not: another learning rate, or a last step of fewer batches. The message says which.
        """
        changed = next((name for name in LENGTHS if getattr(before, name) != getattr(now, name)), None)
        planned, total = self.total_steps(before), self.total_steps(now)
        if changed is None or (planned == total and bool(before.max_steps) == bool(now.max_steps)):
            return
        what = f"cannot resume: {changed} was {getattr(before, changed)} and now is {getattr(now, changed)}"
        if step > total:
            raise ValueError(f"{what}, which makes {total} steps, and {step} are taken already")
        other = next((at for at in range(step) if self.rate(before, at) != self.rate(now, at)), None)
        if other is not None:
            raise ValueError(
                f"{what}: by the {now.lr_scheduler_type} schedule, step {other} would have had the learning rate "
                f"{self.rate(now, other):.3g} and had {self.rate(before, other):.3g}; to train the adapter further "
                f"by a schedule of its own, start a new run with --adapter {run}"
            )
        if step == planned and self._last_is_partial(before) and not (step == total and self._last_is_partial(now)):
            raise ValueError(
                f"{what}: the data had too few batches for the last step, which a longer run would have filled up; "
                f"to train the adapter further, start a new run with --adapter {run}"
            )

    def _last_is_partial(self, settings: TrainConfig) -> bool:
        """Whether the last step has fewer batches than the others, since the last epoch ends in it."""
        return not settings.max_steps and settings.num_train_epochs * self.batches_per_epoch % self.per_step != 0
