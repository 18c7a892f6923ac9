"""A QLoRA script of transformers, PEFT and Trainer trains to the same losses with two of its lines changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from int4_models import from_pretrained, with_bitsandbytes
from trainers import keep_libraries_out_of_collections, make_trainer

import mebp_triton as mebp
from mebp_triton.huggingface import peft_layer
from mebp_triton.models.adapter import adapter_layers

STEPS = 8
LAYERS = 21


@pytest.fixture(scope="module")
def source(shared_store: Any) -> Path:
    return shared_store("llama", config={"hidden_size": 64, "intermediate_size": 128}).parent / "model"


@pytest.fixture(scope="module")
def unchanged_run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trainer of the script as its author wrote it."""
    return script(source, tmp_path_factory.mktemp("unchanged"))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The addresses of the weights that the fused operation was called with: one for each layer."""
    weights: set[int] = set()
    original = peft_layer.int4_lora_linear

    def noted(x: Any, weight: Any, *args: Any) -> Any:
        weights.add(weight.packed.data_ptr())
        return original(x, weight, *args)

    monkeypatch.setattr(peft_layer, "int4_lora_linear", noted)
    return weights


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    # Every token follows from the one before: something to learn.
    starts = torch.randint(3, 97, (count, 1), generator=generator)
    ids = 3 + (starts + 7 * torch.arange(16)) % 94
    return [{"input_ids": row, "attention_mask": torch.ones(16, dtype=torch.int64), "labels": row} for row in ids]


def unchanged(model: Any) -> Any:
    return model


def script(
    source: Path,
    output: Path,
    after_loading: Callable[[Any], Any] = unchanged,
    after_peft: Callable[[Any], Any] = unchanged,
    resume: bool = False,
    prepare: bool = False,
    **arguments: Any,
) -> Any:
    """Runs the script. The two changed lines import mebp_triton, and call ``replace_linears`` at one of two places."""
    keep_libraries_out_of_collections()
    model = after_loading(with_bitsandbytes(source))
    if prepare:
        model = peft.prepare_model_for_kbit_training(model)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model = after_peft(model)
    settings = transformers.TrainingArguments(
        output_dir=str(output),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "seed": 0,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        | arguments,
    )
    trainer = transformers.Trainer(
        model=model, args=settings, train_dataset=rows(48, seed=1), eval_dataset=rows(8, seed=2)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any, key: str = "loss") -> torch.Tensor:
    # Trainer's log rounds to four digits in some versions: enough to see 1e-4 of a loss above 1.
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry], dtype=torch.float64)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert len(ours) == len(theirs) > 0
    return float(((ours - theirs).abs() / theirs).max())


PLACES = {"after loading": "after_loading", "after get_peft_model": "after_peft"}


@pytest.mark.parametrize("place", PLACES)
def test_two_changed_lines_train_to_the_same_losses(
    place: str, source: Path, tmp_path: Path, unchanged_run: Any, fused: set[int]
) -> None:
    theirs, ours = unchanged_run, script(source, tmp_path, **{PLACES[place]: mebp.replace_linears})
    assert len(fused) == LAYERS
    assert difference(losses(ours), losses(theirs)) < 1e-4
    assert difference(losses(ours, "grad_norm"), losses(theirs, "grad_norm")) < 1e-4
    assert losses(ours)[-1] < 0.8 * losses(ours)[0], "it should learn"
    weights = [dict(trainer.model.named_parameters()) for trainer in (ours, theirs)]
    trained = [name for name, parameter in weights[1].items() if parameter.requires_grad]
    assert len(trained) == 2 * LAYERS
    for name in trained:
        assert torch.allclose(weights[0][name], weights[1][name], rtol=1e-2, atol=1e-4), name


def test_accumulation_clipping_and_gradient_checkpointing(source: Path, tmp_path: Path, fused: set[int]) -> None:
    """The model is prepared for k-bit training, as older scripts do, and Trainer does all that it can."""
    arguments = {
        "max_steps": 5,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.3,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
    }
    theirs = script(source, tmp_path, prepare=True, **arguments)
    ours = script(source, tmp_path, prepare=True, after_peft=mebp.replace_linears, **arguments)
    assert len(fused) == LAYERS
    assert difference(losses(ours), losses(theirs)) < 1e-4


def test_evaluating_saving_and_resuming(source: Path, tmp_path: Path) -> None:
    steps = {"max_steps": 4}
    arguments = steps | {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    whole = script(source, tmp_path / "run", after_peft=mebp.replace_linears, **arguments)
    plain = script(source, tmp_path / "plain", after_peft=mebp.replace_linears, **steps)
    assert torch.equal(losses(plain), losses(whole)), "an evaluation changes nothing"
    evaluations = losses(whole, "eval_loss")
    assert len(evaluations) == 4 and evaluations[-1] < evaluations[0]
    last = tmp_path / "run" / "checkpoint-4"
    saved = sum(file.stat().st_size for file in last.glob("adapter_model*"))
    assert saved > 0 and not (last / "model.safetensors").exists()
    shutil.rmtree(last)  # as if it had been interrupted after the second step
    again = script(source, tmp_path / "run", after_peft=mebp.replace_linears, resume=True, **arguments)
    assert again.state.global_step == 4 and torch.equal(losses(again), losses(whole))
    loaded = peft.PeftModel.from_pretrained(mebp.replace_linears(from_pretrained(source)), last)
    ours, theirs = dict(loaded.named_parameters()), dict(again.model.named_parameters())
    trained = [name for name, parameter in theirs.items() if parameter.requires_grad]
    assert trained and all(torch.equal(ours[name], theirs[name]) for name in trained)


def test_trainer_and_our_own_adapters(source: Path, tmp_path: Path) -> None:
    """Trainer trains, saves and resumes a model with ``lora=``, which PEFT has no part in."""

    def run(resume: bool) -> Any:
        model = mebp.replace_linears(from_pretrained(source), mebp.LoraConfig(r=8, lora_alpha=16))
        trainer = make_trainer(model, tmp_path)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return trainer

    whole, again = run(False), run(True)
    assert len(losses(whole)) == 4 and all(layer.lora_B.any() for layer in adapter_layers(whole.model).values())
    assert torch.equal(losses(again), losses(whole))
