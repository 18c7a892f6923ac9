"""The steps of a run: their number, and which other length leaves those already taken as they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mebp_triton.data.tokenized import DataReport, TokenizedData
from mebp_triton.training.course import Course
from mebp_triton.training.processes import Processes
from mebp_triton.training.settings import TrainConfig

BY_EPOCHS = TrainConfig(lr_scheduler_type="constant", num_train_epochs=2, warmup_steps=3)
BY_STEPS = replace(BY_EPOCHS, max_steps=9)
RUN = Path("run")


@pytest.mark.parametrize(
    ("most", "expected"), [(100, {64, 100, 130}), (512, {64, 128, 192}), (513, {128, 256}), (2048, {256})]
)
def test_rows_for_graphs_of_blocks_have_few_widths(most, expected):
    """Of eight at most, so multiples of 64 tokens, of 128 for rows of more than 512, and so on."""
    offsets = np.cumsum([0, 5, 60, 70, 90, 130])
    ids = np.arange(offsets[-1]) % 90
    data = TokenizedData(ids, np.ones(len(ids), bool), offsets, DataReport(5, len(ids), len(ids) - 5, 0, 0))
    settings = TrainConfig(max_length=most, block_graphs=True, max_steps=5)
    stream = Course(5, 1).micro_batches(data, settings, 0, Processes(), 0)
    widths = {next(stream)[0]["input_ids"].shape[1] for _ in range(5)}
    assert widths == expected


def test_steps_are_counted_by_epochs_unless_their_number_is_given():
    assert Course(10, 4).total_steps(BY_EPOCHS) == 5 and Course(10, 4).total_steps(BY_STEPS) == 9


def test_a_constant_rate_allows_any_length_that_is_not_over():
    course = Course(10, 4)
    course.check_same_steps(BY_STEPS, replace(BY_STEPS, max_steps=90), 9, RUN)
    course.check_same_steps(BY_STEPS, replace(BY_STEPS, max_steps=5), 5, RUN)
    course.check_same_steps(BY_EPOCHS, replace(BY_EPOCHS, num_train_epochs=4), 5, RUN)
    with pytest.raises(ValueError, match="max_steps was 9 and now is 5, which makes 5 steps, and 6 are taken already"):
        course.check_same_steps(BY_STEPS, replace(BY_STEPS, max_steps=5), 6, RUN)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_falling_rate_allows_it_during_the_warm_up_alone(kind):
    before = replace(BY_STEPS, lr_scheduler_type=kind)
    now = replace(before, max_steps=10)
    Course(10, 4).check_same_steps(before, now, 4, RUN)  # at step 3 both have the peak
    with pytest.raises(ValueError, match=f"by the {kind} schedule, step 4 would .* start a new run with --adapter run"):
        Course(10, 4).check_same_steps(before, now, 5, RUN)


def test_a_last_step_of_fewer_batches_would_be_another_one_in_a_longer_run():
    partial, whole = Course(10, 3), Course(9, 3)
    longer = replace(BY_EPOCHS, num_train_epochs=3)
    whole.check_same_steps(BY_EPOCHS, longer, 6, RUN)
    partial.check_same_steps(BY_EPOCHS, longer, 6, RUN)  # of 7 steps, the last is not taken yet
    for now in (longer, replace(BY_EPOCHS, max_steps=7), replace(BY_EPOCHS, max_steps=8)):
        with pytest.raises(ValueError, match="too few batches for the last step"):
            partial.check_same_steps(BY_EPOCHS, now, 7, RUN)
