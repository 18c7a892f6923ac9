"""Evaluations during a training: made when due, written to the metrics, and compared when a run is resumed."""

import pytest

from mebp_triton.system.errors import Interrupted
from mebp_triton.training.evaluation import Evaluation
from mebp_triton.training.interim import InterimEvaluations
from mebp_triton.training.processes import ALONE
from mebp_triton.training.run_directory import RunDirectory
from mebp_triton.training.run_settings import resolve
from mebp_triton.training.settings import TrainConfig
from mebp_triton.training.standing import Standing


@pytest.fixture
def interim(tmp_path):
    settings = resolve(TrainConfig(eval_steps=2, validation_file="held-out.txt", output_dir=str(tmp_path / "run")))
    run = RunDirectory(tmp_path / "run")
    run.create()
    return InterimEvaluations(None, settings, run, ALONE)


def test_none_is_made_before_it_is_due_or_without_a_way_to_make_it(interim):
    assert not interim.run_if_due(Standing(), 2)
    interim.evaluate = lambda: Evaluation(1.0, 0.5, 10, 1)
    assert [interim.run_if_due(Standing(), step) for step in (1, 2, 3, 4)] == [False, True, False, True]


def test_what_was_found_is_written_and_told(interim):
    standing, told = Standing(), []
    interim.on_evaluated = lambda *found: told.append(found)
    for step, loss in ((2, 3.0), (4, 2.0), (6, 2.5)):
        interim.evaluate = lambda loss=loss: Evaluation(loss, 0.5, 10, 1)
        assert interim.run_if_due(standing, step)
    assert [(step, found.loss, best) for step, found, best in told] == [(2, 3.0, True), (4, 2.0, True), (6, 2.5, False)]
    rows = interim.run.read_evaluations()
    assert [(row["step"], row["eval_loss"], row["best"], row["not_improved"]) for row in rows] == [
        (1, 3.0, True, 0),
        (3, 2.0, True, 0),
        (5, 2.5, False, 1),
    ]
    assert interim.last is told[-1][1] and interim.seconds == pytest.approx(sum(row["eval_seconds"] for row in rows))
    assert standing.of == interim.identity and not standing.kept


def test_an_interrupted_one_leaves_nothing(interim):
    def interrupted():
        raise Interrupted(2)

    interim.evaluate, standing = interrupted, Standing()
    with pytest.raises(Interrupted):
        interim.run_if_due(standing, 2)
    assert standing == Standing() and not interim.run.read_evaluations() and interim.last is None


def test_the_best_of_other_data_does_not_count_for_a_resumed_run(interim):
    saved = Standing(4, 2, 1.5, 1, True, interim.identity)
    assert interim.resume(saved) is saved
    saved.of = interim.identity | {"validation_file": "other.txt"}
    with pytest.warns(UserWarning, match="the best evaluation so far is forgotten"):
        assert interim.resume(saved) == Standing(4)
