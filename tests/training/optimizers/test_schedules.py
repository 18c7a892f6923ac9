"""The learning rate of every step is that of transformers' schedulers."""

import pytest
import torch
import transformers
from torch import nn

from mebp_triton.training.optimizers.schedules import SCHEDULER_TYPES, learning_rate


@pytest.mark.parametrize("kind", SCHEDULER_TYPES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (1, 1), (12, 10), (5, 200)])
def test_the_rate_is_that_of_transformers_at_every_step(kind, warmup, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    names = {"constant": "constant_with_warmup"}
    scheduler = transformers.get_scheduler(names.get(kind, kind), optimizer, warmup, total)
    for step in range(total + 3):
        theirs = optimizer.param_groups[0]["lr"]
        ours = learning_rate(step, 0.3, kind, warmup, total)
        assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-15), f"step {step}"
        optimizer.step()
        scheduler.step()


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="lr scheduler type must be one of linear, cosine, constant, got 'step'"):
        learning_rate(0, 1.0, "step", 0, 10)
