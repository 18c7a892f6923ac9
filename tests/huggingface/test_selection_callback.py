"""Hugging Face's Trainer, unchanged, with a selection: it advances per optimizer step and is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import decoded_model, loaded
from trainers import Stop, make_trainer
from transformers import TrainerCallback

import mebp_triton as mebp


@pytest.fixture(scope="module")
def store(shared_store: Any) -> Path:
    return shared_store("llama")


def model_of(kind: str, store: Path) -> Any:
    """The same model each time, with a random adapter: from ``load``, or PEFT's over transformers'."""
    if kind == "load":
        return loaded(store)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(decoded_model(store), config)


def run(
    model: Any, output: Path, mode: Any = "exact", schedule: Any = "random", stop: int | None = None, **options: Any
) -> tuple[mebp.LayerCyclicManager, list[frozenset[int]]]:
    """Trains with a selection; returns it, and what was selected in each step."""
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode, schedule=schedule, seed=3)
    seen: list[frozenset[int]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert selection.step == state.global_step
            seen.append(selection.selected)

    callbacks: list[Any] = [mebp.SelectionCallback(selection), Watch(), *([Stop(stop)] if stop else [])]
    resume = options.pop("resume", None)
    make_trainer(model, output, callbacks, gradient_accumulation_steps=2, **options).train(resume)
    return selection, seen


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("kind", "mode", "schedule", "checkpointing"),
    [
        ("peft", "exact", "random", False),
        ("peft", "exact", "importance", True),
        ("load", "identity", "random", False),
        ("load", "exact", "importance", False),
    ],
)
def test_a_resumed_run_selects_and_ends_as_an_uninterrupted_one(
    store: Path, tmp_path: Path, kind: str, mode: Any, schedule: Any, checkpointing: bool
) -> None:
    options: dict[str, Any] = {"mode": mode, "schedule": schedule, "gradient_checkpointing": checkpointing}
    options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}  # with reentrant ones, inputs need gradients
    model, again = model_of(kind, store), model_of(kind, store)
    selection, seen = run(model, tmp_path / "straight", save_strategy="no", **options)
    assert selection.step == 4 and len(set(seen)) > 1
    with pytest.raises(InterruptedError):
        run(model_of(kind, store), tmp_path / "cut", stop=2, **options)
    _, rest = run(again, tmp_path / "cut", resume=True, **options)
    assert rest == seen[2:]
    truth = trained(model)
    assert all(torch.equal(tensor, truth[name]) for name, tensor in trained(again).items())


def test_after_training_the_selection_stands_still(store: Path, tmp_path: Path) -> None:
    model = model_of("peft", store)
    selection, _ = run(model, tmp_path, max_steps=1, save_strategy="no")
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad]).step()
    assert selection.step == 1


def test_what_is_not_selected_may_stay_as_it_is(store: Path, tmp_path: Path) -> None:
    """A step of AdamW with weight decay would change it even without a gradient."""
    model = model_of("peft", store)
    before = {name: tensor.clone() for name, tensor in trained(model).items()}
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode="exact", seed=3)
    chosen = selection.selected
    callback = mebp.SelectionCallback(selection, unselected_update="none")
    make_trainer(model, tmp_path, [callback], max_steps=1, weight_decay=0.1, save_strategy="no").train()
    changed = {
        int(name.split(".")[4]) for name, tensor in trained(model).items() if not torch.equal(tensor, before[name])
    }
    assert changed == chosen


@pytest.mark.parametrize("schedule", ["importance", "random"])
def test_a_checkpoint_without_the_selection(store: Path, tmp_path: Path, schedule: Any) -> None:
    """The step alone tells what a schedule selects, unless it goes by norms, which are lost."""
    with pytest.raises(InterruptedError):
        run(model_of("peft", store), tmp_path, schedule=schedule, stop=2)
    (tmp_path / "checkpoint-2" / "selection.json").unlink()
    model = model_of("peft", store)
    if schedule == "importance":
        with pytest.raises(ValueError, match=r"cannot resume: .*selection\.json is missing"):
            run(model, tmp_path, schedule=schedule, resume=True)
    else:
        assert run(model, tmp_path, schedule=schedule, resume=True)[0].step == 4
