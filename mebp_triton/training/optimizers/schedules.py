"""Learning rate schedules, as functions of the step."""

from __future__ import annotations

import math
from typing import Literal, get_args

SchedulerType = Literal["linear", "cosine", "constant"]
SCHEDULER_TYPES: tuple[SchedulerType, ...] = get_args(SchedulerType)


def learning_rate(step: int, peak: float, kind: SchedulerType, warmup_steps: int, total_steps: int) -> float:
    """Returns the learning rate of ``step`` (from 0): a linear warm-up, then linear or half-cosine to 0, or constant.

    The values are those of ``transformers.get_scheduler``. They depend on the step alone, so that no state is saved and
    a resumed run cannot step a schedule twice.
    """
    if kind not in SCHEDULER_TYPES:
        raise ValueError(f"lr scheduler type must be one of {', '.join(SCHEDULER_TYPES)}, got {kind!r}")
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    if kind == "constant":
        return peak
    decaying = max(1, total_steps - warmup_steps)
    if kind == "linear":
        return peak * max(0.0, (total_steps - step) / decaying)
    progress = (step - warmup_steps) / decaying
    return peak * (0.5 * (1.0 + math.cos(math.pi * progress)))
