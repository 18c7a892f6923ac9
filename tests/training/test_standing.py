"""The standing of a run among its evaluations: the best one, and an end for lack of progress, as in transformers."""

import random
from types import SimpleNamespace

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.standing import Standing


@pytest.mark.parametrize("threshold", [0.0, 0.25])
@pytest.mark.parametrize("patience", [1, 3])
def test_the_end_comes_where_transformers_stops(threshold, patience):
    draw = random.Random(7)
    arguments = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    settings = TrainConfig(
        validation_file="v.txt", eval_steps=1, early_stopping_patience=patience, early_stopping_threshold=threshold
    )
    for _ in range(20):
        callback = EarlyStoppingCallback(patience, threshold)
        standing, state, control = Standing(), TrainerState(), TrainerControl()
        for step in range(1, 20):
            loss = draw.choice([1.0, 1.25, 1.5, 1.625, 1.75, 2.0])
            callback.on_evaluate(arguments, state, control, {"eval_loss": loss})
            best = state.best_metric is None or loss < state.best_metric
            state.best_metric = loss if best else state.best_metric
            assert standing.take_in(step, loss, threshold) == best
            assert (standing.best_loss, standing.evaluated_at) == (state.best_metric, step)
            assert standing.not_improved == callback.early_stopping_patience_counter
            assert standing.is_over(settings) == control.should_training_stop
            if control.should_training_stop:
                break


def test_evaluations_are_due_every_so_many_steps_and_once():
    settings = TrainConfig(validation_file="v.txt", eval_steps=4)
    standing = Standing()
    assert [step for step in range(13) if standing.is_due(settings, step)] == [4, 8, 12]
    standing.take_in(8, 1.0, 0.0)
    assert [step for step in range(13) if standing.is_due(settings, step)] == [12]
    assert not any(standing.is_due(TrainConfig(), step) for step in range(13))
    assert not standing.is_over(settings)
