"""The ways to take a step: after the backward pass, in it to the same bits, and by zeroth order."""

import math

import numpy as np
import pytest
import torch
from models import randomize_adapter
from runs import (
    DEMANDING,
    Crash,
    adapter_of,
    assert_same_tensors,
    checkpoint_tensors,
    crash_at,
    metrics,
    resumed,
    trainer,
)

from mebp_triton.system.errors import RunError
from mebp_triton.training.processes import Processes
from mebp_triton.training.run_directory import RunDirectory
from mebp_triton.training.trainer import Trainer

ONE_BLOCK = {"max_steps": 2, "selection_mode": "identity", "selected_ratio": 0.34, "unselected_update": "none"}


def test_several_processes_do_not_step_in_the_backward_pass(store, data, tmp_path):
    """The refusal comes before the run directory is made, and before the model has a selection."""
    made = trainer(store, data, tmp_path / "run", max_steps=1, optimizer_in_backward=True)
    made.selection.remove()
    other = RunDirectory(tmp_path / "other")
    for _ in range(2):
        with pytest.raises(ValueError, match="optimizer_in_backward steps before the gradients of other processes"):
            Trainer(made.model, data, made.config, other, processes=Processes(0, 2))
    assert not other.directory.exists()


@pytest.mark.parametrize(("optim", "residency"), [("adamw", "file"), ("adamw_8bit", "host")])
def test_the_optimizers_state_is_as_the_settings_say(store, data, tmp_path, optim, residency):
    made = trainer(store, data, tmp_path / "run", max_steps=1, optim=optim, optimizer_state=residency)
    moments = made.update.optimizer.moments
    assert moments.eight_bit == (optim == "adamw_8bit") and bool(moments.slots) == (residency == "file")


@pytest.mark.parametrize("within", [False, True])
def test_what_lies_outside_of_blocks_is_trained_at_every_step(store, data, tmp_path, within):
    made = trainer(store, data, tmp_path / "run", optimizer_in_backward=within, **ONE_BLOCK)
    made.selection.remove()
    norm = made.model.model.norm
    norm.extra = torch.nn.Parameter(torch.zeros(norm.weight.shape))
    norm.register_forward_hook(lambda module, inputs, output: output + module.extra)
    again = Trainer(made.model, data, made.config, RunDirectory(tmp_path / "again"))
    values = []
    again.train(lambda result: values.append(norm.extra.detach().clone()))
    assert [len(result["selected_blocks"]) for result in again.run.read_metrics()] == [1, 1]
    assert values[0].any() and not torch.equal(values[1], values[0]) and norm.extra.grad is None


def gradient_norms(made):
    """Each block's norm, taken when its gradients are complete, by hooks on the parameters."""
    squares = {}
    for index in range(made.selection.count):
        for parameter in made.model.mebp.engine.trainable(index):

            def add(parameter, index=index):
                squares[index] = squares.get(index, 0.0) + float(parameter.grad.square().sum())

            parameter.register_post_accumulate_grad_hook(add)
    return squares


@pytest.mark.parametrize(("within", "limit"), [(False, 0.01), (False, 1e6), (True, 0.01)])
def test_an_importance_schedule_is_told_the_norms_from_before_clipping(store, data, tmp_path, within, limit):
    settings = {"selection_mode": "exact", "selection_schedule": "importance", "selected_ratio": 0.67}
    settings |= {"max_grad_norm": limit, "optimizer_in_backward": within}
    made = trainer(store, data, tmp_path / "run", max_steps=1, **settings)
    randomize_adapter(made.model)
    squares, selected = gradient_norms(made), sorted(made.selection.selected)
    made.train()
    assert len(selected) == 2 and all(squares[index] > 1e-4 for index in selected)
    for index, norm in enumerate(made.selection.norms):
        assert norm is None if index not in selected else norm == pytest.approx(math.sqrt(squares[index]), rel=1e-4)


# --- in the backward pass -------------------------------------------------------------------------------------------

WITHIN = DEMANDING | {"gradient_accumulation_steps": 1, "optimizer_in_backward": True, "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    ("mode", "update"), [("full", "none"), ("identity", "momentum"), ("exact", "none"), ("freeze", "momentum")]
)
def test_stepping_in_the_backward_pass_changes_no_bit(store, data, tmp_path, mode, update):
    settings = WITHIN | {"max_steps": 4, "selection_mode": mode, "unselected_update": update}
    made = []
    for within in (True, False):
        made.append(trainer(store, data, tmp_path / str(within), **(settings | {"optimizer_in_backward": within})))
        made[-1].train()
    names = ("step", "loss", "token_accuracy", "tokens", "learning_rate", "selected_blocks")
    assert metrics(made[0], *names) == metrics(made[1], *names)
    for ours, theirs in zip(metrics(made[0], "grad_norm"), metrics(made[1], "grad_norm"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5) and ours[0] > 0
    ours, theirs = (checkpoint_tensors(one.run.checkpoint) for one in made)
    assert "optimizer-00002/moments" in ours
    assert_same_tensors(ours, theirs)


def test_resuming_with_the_optimizer_in_the_backward_pass(store, data, tmp_path):
    settings = WITHIN | {"max_grad_norm": 0.3, "max_steps": 6}
    straight = trainer(store, data, tmp_path / "straight", **settings)
    straight.train()
    made = trainer(store, data, tmp_path / "cut", **settings)
    with pytest.raises(Crash):
        made.train(crash_at(4))
    again = resumed(store, data, tmp_path / "cut", **settings)
    assert again.step == 4
    again.train()
    assert metrics(again, "loss", "grad_norm") == metrics(straight, "loss", "grad_norm")
    assert_same_tensors(checkpoint_tensors(again.run.checkpoint), checkpoint_tensors(straight.run.checkpoint))


def test_with_the_optimizer_in_the_backward_pass_each_block_is_clipped_by_its_own_norm(
    store, data, tmp_path, monkeypatch
):
    settings = {"max_steps": 3, "optimizer_in_backward": True, "learning_rate": 1e-2}
    losses, seen = {}, []
    clip = torch.nn.utils.clip_grads_with_norm_

    def noted(parameters, most, total):
        seen.append((len(parameters), most))
        return clip(parameters, most, total)

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", noted)
    for limit in (0.0, 0.05, 1e9):
        made = trainer(store, data, tmp_path / str(limit), max_grad_norm=limit, **settings)
        seen.clear()
        made.train()
        assert seen == [(14, limit)] * 9 * (limit == 0.05)  # three blocks, three steps; larger limits cost nothing
        losses[limit] = metrics(made, "loss", "grad_norm")
    assert losses[0.0] == losses[1e9] != losses[0.05]
    assert losses[0.0][0] == losses[0.05][0], "the norm is that before clipping"


def test_a_loss_that_is_not_a_number_ends_the_run_before_any_block_is_stepped(store, data, tmp_path):
    settings = {"max_steps": 6, "save_steps": 2, "optimizer_in_backward": True}
    made = trainer(store, data, tmp_path / "run", **settings)
    counts = []

    def steps_taken():
        return [[float(step) for step in steps] for steps in made.update.optimizer.steps]

    def spoil(result):
        if result.step == 2:
            with torch.no_grad():
                made.parameters[0].fill_(float("nan"))
            counts.append(steps_taken())

    with pytest.raises(RunError, match="loss is nan at step 3"):
        made.train(spoil)
    assert steps_taken() == counts[0]
    assert len(resumed(store, data, tmp_path / "run", **settings).train()) == 4


@pytest.mark.parametrize("step", [0, 3])
def test_a_blocks_gradient_that_is_not_finite_ends_the_run_before_its_step(store, data, tmp_path, step):
    """Blocks above it have been stepped by then: the checkpoint from before is kept, and nothing newer is written."""
    made = trainer(store, data, tmp_path / "run", max_steps=5, save_steps=2, optimizer_in_backward=True)
    layer = made.model.model.layers[1].mlp.up_proj
    layer.lora_A.register_hook(lambda grad: grad * (math.inf if made.step == step else 1))
    broken = rf"norm is (inf|nan) at step {step}, first .*1.mlp.up_proj.lora_A \(block 1\): lower"
    kept = "the last checkpoint is kept" if step else "no checkpoint was written yet"
    with pytest.raises(RunError, match=f"{broken} the learning rate, .*, in a new run; {kept}$"):
        made.train()
    assert [max(map(float, steps)) for steps in made.update.optimizer.steps] == [step, step, step + 1]
    assert all(torch.isfinite(tensor).all() for tensor in adapter_of(made).values())
    assert len(made.run.read_metrics()) == step and made.run.checkpoint.exists() == bool(step)
    if step:
        assert made.checkpoint.resume(made.run.checkpoint, made.course).step == 2


# --- mezo -----------------------------------------------------------------------------------------------------------


def test_mezo_runs_repeats_and_resumes(store, data, tmp_path):
    settings = {"optim": "mezo", "max_steps": 6, "save_steps": 3, "learning_rate": 1e-3, "lora_dropout": 0.1}
    whole = trainer(store, data, tmp_path / "whole", **settings)
    results = whole.train()
    assert all(math.isfinite(r.loss) and r.grad_norm is None and 0 <= r.token_accuracy <= 1 for r in results)
    made = trainer(store, data, tmp_path / "cut", **settings)
    with pytest.raises(Crash):
        made.train(crash_at(4))
    again = resumed(store, data, tmp_path / "cut", **settings)
    assert again.step == 3 and made.update.state_groups == 0
    again.train()
    assert metrics(again, "loss", "token_accuracy") == metrics(whole, "loss", "token_accuracy")
    assert_same_tensors(adapter_of(again), adapter_of(whole))
    assert not any(name.startswith("optimizer") for name in checkpoint_tensors(again.run.checkpoint))
    for use in (made.update.export_group, made.update.release_group):
        with pytest.raises(IndexError, match="no state group 0"):
            use(0)


def test_mezo_draws_other_directions_at_every_step_and_seed(store, data, tmp_path):
    drawn, dropped = [], []
    for seed in (0, 1):
        made = trainer(
            store, data, tmp_path / str(seed), optim="mezo", max_steps=4, lora_dropout=0.1, seed=seed, save_steps=9
        )
        passes = made.update.passes

        def forward(inputs, seed, original=passes.forward):
            numbers = original(inputs, seed)
            drawn.append(seed)
            dropped.append(torch.random.get_rng_state().sum().item())
            return numbers

        passes.forward = forward
        made.train()
    assert drawn[0::2] == drawn[1::2] and len(set(drawn)) == 8
    # Both passes of a step drop the same.
    assert dropped[0::2] == dropped[1::2] and len(set(dropped)) == 8


def test_mezo_counts_the_tokens_of_every_micro_batch(store, data, tmp_path):
    seen = []
    for optim in ("adamw", "mezo"):
        made = trainer(
            store,
            data,
            tmp_path / optim,
            optim=optim,
            max_steps=2,
            gradient_accumulation_steps=3,
            learning_rate=1e-12,
            mezo_epsilon=1e-6,
        )
        randomize_adapter(made.model)
        made.train()
        seen.append([row["token_accuracy"] for row in made.run.read_metrics()])
    assert seen[0] == pytest.approx(seen[1]) and any(seen[0])


def test_mezo_learns_something(store, data, tmp_path):
    settings = {"max_steps": 60, "learning_rate": 5e-3, "lr_scheduler_type": "constant", "save_steps": 1000}
    made = trainer(store, data, tmp_path / "run", optim="mezo", per_device_train_batch_size=2, **settings)
    losses = [result.loss for result in made.train()]
    assert np.mean(losses[-15:]) < np.mean(losses[:15]) - 0.08
