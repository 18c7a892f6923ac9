"""A QLoRA script of transformers, PEFT and Trainer, unchanged and with two lines changed, trains to the same losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import save_tiny_model

import mebp_triton as mebp
from mebp_triton.huggingface import peft_layer

STEPS = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return save_tiny_model("llama", directory, hidden_size=64, intermediate_size=128)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a call of the fused operation."""
    calls: list[int] = []
    original = peft_layer.int4_lora_linear
    monkeypatch.setattr(peft_layer, "int4_lora_linear", lambda *args: calls.append(1) or original(*args))
    return calls


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
    """The script. Its two lines: ``import mebp_triton as mebp``, and ``model = mebp.replace_linears(model)`` at one of
    two places."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=quantization
    )
    model = after_loading(model)
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
            "learning_rate": 3e-3,
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
    place: str, source: Path, tmp_path: Path, fused: list[int], record_property: Callable[[str, object], None]
) -> None:
    theirs = script(source, tmp_path)
    assert not fused
    ours = script(source, tmp_path, **{PLACES[place]: mebp.replace_linears})
    assert len(fused) == STEPS * 21
    found = difference(losses(ours), losses(theirs))
    record_property("largest relative difference", found)
    print(f"{place}: largest relative difference of {STEPS} losses {found:.1e}")
    assert found < 1e-4
    norms = difference(losses(ours, "grad_norm"), losses(theirs, "grad_norm"))
    print(f"{place}: of the gradients' norms {norms:.1e}")
    assert norms < 1e-4
    assert losses(ours)[-1] < 0.7 * losses(ours)[0], "it should learn"
    weights = [dict(trainer.model.named_parameters()) for trainer in (ours, theirs)]
    trained = [name for name, parameter in weights[1].items() if parameter.requires_grad]
    assert len(trained) == 42
    for name in trained:
        assert torch.allclose(weights[0][name], weights[1][name], rtol=1e-2, atol=1e-4), name


def test_accumulation_clipping_and_gradient_checkpointing(source: Path, tmp_path: Path, fused: list[int]) -> None:
    """Prepared for k-bit training, as older scripts do it, and with everything that Trainer brings."""
    arguments = {
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
    assert len(fused) == 2 * 2 * STEPS * 21, "every layer is computed again in the backward pass"
    found = difference(losses(ours), losses(theirs))
    print(f"largest relative difference of {STEPS} losses {found:.1e}")
    assert found < 1e-4


def test_evaluating_saving_and_resuming(source: Path, tmp_path: Path) -> None:
    steps = {"max_steps": 12}
    arguments = steps | {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 6}
    whole = script(source, tmp_path / "run", after_peft=mebp.replace_linears, **arguments)
    plain = script(source, tmp_path / "plain", after_peft=mebp.replace_linears, **steps)
    assert torch.equal(losses(plain), losses(whole)), "an evaluation changes nothing"
    evaluations = losses(whole, "eval_loss")
    assert len(evaluations) == 4 and evaluations[-1] < evaluations[0]
    last = tmp_path / "run" / "checkpoint-12"
    saved = sum(file.stat().st_size for file in last.glob("adapter_model*"))
    assert saved > 0 and not (last / "model.safetensors").exists()
    # As if it had been interrupted after the sixth step.
    for file in sorted(last.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    last.rmdir()
    again = script(source, tmp_path / "run", after_peft=mebp.replace_linears, resume=True, **arguments)
    assert again.state.global_step == 12 and torch.equal(losses(again), losses(whole))
    loaded = peft.PeftModel.from_pretrained(mebp.replace_linears(plain_model(source)), last)
    ours, theirs = dict(loaded.named_parameters()), dict(again.model.named_parameters())
    trained = [name for name, parameter in theirs.items() if parameter.requires_grad]
    assert trained and all(torch.equal(ours[name], theirs[name]) for name in trained)


def plain_model(source: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def test_trainer_and_our_own_adapters(source: Path, tmp_path: Path) -> None:
    """Without PEFT: Trainer trains, saves and resumes a model with ``lora=``."""

    def run(output: Path, resume: bool = False) -> Any:
        model = mebp.replace_linears(plain_model(source), mebp.LoraConfig(r=8, lora_alpha=16))
        settings = transformers.TrainingArguments(
            output_dir=str(output),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            logging_steps=1,
            seed=0,
            report_to="none",
            save_steps=3,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows(48, seed=1))
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-3") if resume else None)
        return trainer

    whole = run(tmp_path)
    again = run(tmp_path, resume=True)
    assert len(losses(whole)) == 6 and losses(whole)[-1] < losses(whole)[0]
    assert torch.equal(losses(again), losses(whole))
