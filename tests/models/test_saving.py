"""Hugging Face's Trainer, unchanged, on a model from ``load``: as on transformers + PEFT with the decoded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import batch, decoded_model, peft_model, randomize_adapter, tiny_store
from transformers import Trainer, TrainerCallback, TrainingArguments

import mebp_triton as mebp
from mebp_triton.models.adapter import adapter_tensors


@pytest.fixture(scope="module")
def store() -> Path:
    return tiny_store("llama")


def ours(store: Path, **options: Any) -> Any:
    model = mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8), **options)
    randomize_adapter(model)
    return model


def rows(first: int, count: int) -> list[dict[str, Any]]:
    examples = [batch(rows=1, padding=None, seed=seed) for seed in range(first, first + count)]
    return [{name: tensor[0] for name, tensor in example.items()} for example in examples]


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    assert logits.shape == (*labels.shape, 97)
    return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:]).mean()), "peak": float(logits.max())}


class Stop(TrainerCallback):
    """Ends a run early, as a crash would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 4:
            raise InterruptedError


def trainer(model: Any, output: Path, callbacks: Any = (), metrics: Any = accuracy, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "seed": 1,
    }
    arguments = TrainingArguments(output_dir=str(output), use_cpu=True, report_to=[], **(settings | options))
    data = {"train_dataset": rows(0, 12), "eval_dataset": rows(12, 4)}
    return Trainer(model, arguments, compute_metrics=metrics, callbacks=list(callbacks), **data)


def history(job: Trainer, *names: str) -> list[float]:
    return [entry[name] for entry in job.state.log_history for name in names if name in entry]


@pytest.fixture(scope="module")
def straight(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    job = trainer(ours(store), tmp_path_factory.mktemp("straight"))
    job.train()
    return job


NAMES = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_peak")


@pytest.mark.parametrize("places", ["device", "file"])
def test_losses_norms_and_metrics_are_those_of_peft(
    store: Path, straight: Trainer, tmp_path: Path, places: Any
) -> None:
    job = straight
    if places == "file":
        job = trainer(ours(store, weights=places, checkpoints=places), tmp_path / "ours", gradient_checkpointing=True)
        job.train()
    peer = trainer(peft_model(store, ours(store), r=4, lora_alpha=8), tmp_path / "peer")
    peer.train()
    expected = history(peer, *NAMES)
    assert len(expected) == 6 * 2 + 3 * 3 and max(history(peer, "grad_norm")) > 0.5
    assert history(job, *NAMES) == pytest.approx(expected, rel=2e-5)


def test_logits_are_not_computed_for_the_loss_alone(store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    model = ours(store)
    monkeypatch.setattr(type(model.lm_head), "logits", lambda *_: pytest.fail("logits"))
    job = trainer(model, tmp_path, metrics=None, max_steps=2)
    job.train()
    assert len(history(job, "eval_loss")) == 1


def test_a_resumed_run_ends_as_an_uninterrupted_one(store: Path, straight: Trainer, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        trainer(ours(store), tmp_path, [Stop()]).train()
    job = trainer(mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8), seed=9), tmp_path)
    job.train(resume_from_checkpoint=True)
    assert history(job, *NAMES) == history(straight, *NAMES)
    truth = adapter_tensors(straight.model)
    assert all(torch.equal(tensor, truth[name]) for name, tensor in adapter_tensors(job.model).items())


def test_the_best_checkpoint_is_loaded_at_the_end(store: Path, tmp_path: Path) -> None:
    # The rate is so high that the loss rises.
    job = trainer(ours(store), tmp_path, load_best_model_at_end=True, learning_rate=1.0, max_steps=4)
    job.train()
    losses = history(job, "eval_loss")
    assert losses[-1] != min(losses) and job.state.best_metric == min(losses)
    assert job.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_what_is_saved_is_the_adapter(store: Path, straight: Trainer, tmp_path: Path) -> None:
    straight.save_model(str(tmp_path))
    saved = sorted(file.name for file in tmp_path.iterdir())
    assert saved == ["adapter_config.json", "adapter_model.safetensors", "model.safetensors", "training_args.bin"]
    ids = batch(1, 9, None)["input_ids"]
    wrapped = peft.PeftModel.from_pretrained(decoded_model(store), tmp_path)
    again = mebp.load(store, mebp.read_adapter_config(tmp_path))
    mebp.load_adapter(again, tmp_path)
    with torch.no_grad():
        logits = straight.model.eval()(input_ids=ids).logits
        assert torch.allclose(wrapped(input_ids=ids).logits, logits, atol=1e-5)
        assert torch.equal(again(input_ids=ids).logits, logits)


def test_nothing_to_save(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter to save, and its weights lie in"):
        mebp.load(store).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="push_to_hub is not supported"):
        ours(store).save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_a_state_of_other_shapes_is_refused(store: Path, tmp_path: Path) -> None:
    model = ours(store)
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert model.load_state_dict(state, strict=False).missing_keys == []
    first = next(iter(state))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, first: state[first][:2]}, strict=False)
    del state[first]
    assert model.load_state_dict(state, strict=False).missing_keys == [first]


@pytest.mark.parametrize("mode", ["exact", "identity"])
def test_a_selection_advances_and_resumes(store: Path, tmp_path: Path, mode: Any) -> None:
    def run(output: Path, resume: bool = False, stop: bool = False) -> tuple[Any, list[frozenset[int]], Trainer]:
        model = ours(store)
        selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode, schedule="random", seed=3)
        seen: list[frozenset[int]] = []

        class Watch(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                assert selection.step == state.global_step
                seen.append(selection.selected)

        job = trainer(model, output, [mebp.SelectionCallback(selection), Watch(), *([Stop()] if stop else [])])
        job.train(resume_from_checkpoint=resume or None)
        assert selection.step == 6
        return model, seen, job

    model, seen, job = run(tmp_path / "straight")
    assert len(set(seen)) > 1
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", stop=True)
    again, rest, resumed = run(tmp_path / "cut", resume=True)
    assert rest == seen[4:]
    assert history(resumed, *NAMES) == history(job, *NAMES)
    truth = adapter_tensors(model)
    assert all(torch.equal(tensor, truth[name]) for name, tensor in adapter_tensors(again).items())
