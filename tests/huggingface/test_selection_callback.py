"""Hugging Face's Trainer, unchanged, with a selection: it advances per optimizer step and is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import batch, decoded_model, tiny_store
from transformers import Trainer, TrainerCallback, TrainingArguments

import mebp_triton as mebp


@pytest.fixture(scope="module")
def store() -> Path:
    return tiny_store("llama")


def rows(count: int = 12) -> list[dict[str, Any]]:
    examples = [batch(rows=1, padding=None, seed=seed) for seed in range(count)]
    return [{name: tensor[0] for name, tensor in example.items()} for example in examples]


class Stop(TrainerCallback):
    """Ends a run early, as a crash would, after a step's checkpoint was written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self.step:
            raise InterruptedError


def run(
    store: Path, output: Path, schedule: Any = "random", stop: int | None = None, resume: bool = False, **options: Any
) -> tuple[Any, mebp.LayerCyclicManager, list[frozenset[int]]]:
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(decoded_model(store), config)
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode="exact", schedule=schedule, seed=3)
    seen: list[frozenset[int]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert selection.step == state.global_step
            seen.append(selection.selected)

    callbacks: list[Any] = [mebp.SelectionCallback(selection), Watch(), *([Stop(stop)] if stop else [])]
    chosen = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": 2} | options
    arguments = TrainingArguments(
        output_dir=str(output), use_cpu=True, report_to=[], seed=1, per_device_train_batch_size=1, **chosen
    )
    trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    return model, selection, seen


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("schedule", ["random", "importance"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_selects_and_ends_as_an_uninterrupted_one(
    store: Path, tmp_path: Path, schedule: Any, checkpointing: bool
) -> None:
    options = {"gradient_checkpointing": checkpointing}
    model, selection, seen = run(store, tmp_path / "straight", schedule, **options)
    assert selection.step == 6 and len(set(seen)) > 1
    with pytest.raises(InterruptedError):
        run(store, tmp_path / "cut", schedule, stop=4, **options)
    again, _, rest = run(store, tmp_path / "cut", schedule, resume=True, **options)
    assert rest == seen[4:]
    truth = trained(model)
    assert all(torch.equal(tensor, truth[name]) for name, tensor in trained(again).items())


def test_after_training_the_selection_stands_still(store: Path, tmp_path: Path) -> None:
    model, selection, _ = run(store, tmp_path / "run", max_steps=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    assert selection.step == 1


def test_norms_that_are_missing_are_an_error(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        run(store, tmp_path / "cut", "importance", stop=4)
    (tmp_path / "cut" / "checkpoint-4" / "selection.json").unlink()
    with pytest.raises(ValueError, match=r"cannot resume: .*selection\.json is missing"):
        run(store, tmp_path / "cut", "importance", resume=True)
