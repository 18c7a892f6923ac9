"""Hugging Face's Trainer, unchanged, on a model from ``load``: as on transformers + PEFT with the decoded weights."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import batch, decoded_model, loaded, peft_model
from torch import nn
from trainers import Stop, history, make_trainer
from transformers import Trainer

import mebp_triton as mebp
from mebp_triton.layers.linear import Int4Linear
from mebp_triton.models.adapter import adapter_tensors
from mebp_triton.models.saving import FrozenNames, ignore_in_ddp

NAMES = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_peak")


@pytest.fixture(scope="module")
def store(shared_store: Any) -> Path:
    return shared_store("llama")


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    assert logits.shape == (*labels.shape, 97)
    return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:]).mean()), "peak": float(logits.max())}


def trainer(model: Any, output: Path, callbacks: Any = (), **options: Any) -> Trainer:
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "eval_strategy": "steps", "eval_steps": 2}
    return make_trainer(model, output, callbacks, accuracy, **(settings | options))


@pytest.fixture(scope="module")
def straight(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    job = trainer(loaded(store), tmp_path_factory.mktemp("straight"))
    job.train()
    return job


@pytest.fixture(scope="module")
def peer(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    model = peft_model(store, loaded(store), r=4, lora_alpha=8)
    job = trainer(model, tmp_path_factory.mktemp("peer"), save_strategy="no")
    job.train()
    return job


@pytest.mark.parametrize("places", ["device", "file"])
def test_losses_norms_and_metrics_are_those_of_peft(
    store: Path, straight: Trainer, peer: Trainer, tmp_path: Path, places: Any
) -> None:
    job = straight
    if places == "file":
        model = loaded(store, weights=places, checkpoints=places)
        job = trainer(model, tmp_path, gradient_checkpointing=True, save_strategy="no")
        job.train()
    expected = history(peer, *NAMES)
    assert len(expected) == 4 * 2 + 2 * 3 and max(history(peer, "grad_norm")) > 0.5
    assert history(job, *NAMES) == pytest.approx(expected, rel=2e-5)


def test_logits_are_not_computed_for_the_loss_alone(store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    model = loaded(store)
    monkeypatch.setattr(type(model.lm_head), "logits", lambda *_: pytest.fail("logits"))
    job = make_trainer(model, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="no")
    job.train()
    assert len(history(job, "eval_loss")) == 1


def test_a_resumed_run_ends_as_an_uninterrupted_one(store: Path, straight: Trainer, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        trainer(loaded(store), tmp_path, [Stop(2)]).train()
    job = trainer(mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8), seed=9), tmp_path)
    job.train(resume_from_checkpoint=True)
    assert history(job, *NAMES) == history(straight, *NAMES)
    truth = adapter_tensors(straight.model)
    assert all(torch.equal(tensor, truth[name]) for name, tensor in adapter_tensors(job.model).items())


def test_the_best_checkpoint_is_loaded_at_the_end(store: Path, tmp_path: Path) -> None:
    # The loss falls, so that the highest is not the last.
    job = trainer(loaded(store), tmp_path, load_best_model_at_end=True, greater_is_better=True)
    job.train()
    losses = history(job, "eval_loss")
    assert losses[-1] != max(losses) and job.state.best_metric == max(losses)
    assert job.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


def test_only_the_adapter_is_saved(store: Path, straight: Trainer, tmp_path: Path) -> None:
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


def test_a_model_with_nothing_to_save(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter to save, and its weights lie in"):
        mebp.load(store).save_pretrained(tmp_path / "out")
    model = loaded(store)
    with pytest.raises(ValueError, match="push_to_hub is not supported"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    model.model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"norm\.weight is trained as well, which an adapter's files have no place"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_transformers_added_are_saved(store: Path, tmp_path: Path) -> None:
    model = mebp.load(store)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "own")
    plain = decoded_model(store)
    plain.load_adapter(tmp_path / "own")
    ids = batch(1, 9, None)["input_ids"]
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(decoded_model(store)(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-3)


def test_a_state_of_other_shapes_is_refused(store: Path) -> None:
    model = loaded(store)
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert model.load_state_dict(state, strict=False).missing_keys == []
    first = next(iter(state))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, first: state[first][:2]}, strict=False)
    del state[first]
    assert model.load_state_dict(state, strict=False).missing_keys == [first]


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_distributed_data_parallel_sends_the_adapter_alone(store: Path, tmp_path: Path, wrapped: bool) -> None:
    model = mebp.load(store, None if wrapped else mebp.LoraConfig(r=2))
    if wrapped:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", world_size=1, rank=0)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        assert parallel.modules_buffers == []
        names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        assert trained and names - parallel.parameters_to_ignore == trained
        ids = torch.arange(3, 15)[None]
        parallel(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_frozen_names_are_those_of_the_moment_and_of_the_chosen_modules() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    ignore_in_ddp(model, nn.BatchNorm1d)
    names = model._ddp_params_and_buffers_to_ignore
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}

    def with_prefixes(some: set[str]) -> set[str]:
        return {prefix + name for prefix in ("", "base_model.", "base_model.model.") for name in some}

    assert set(names) == {"mine"} | with_prefixes(buffers)
    model[1].weight.requires_grad_(False)
    assert set(names) == {"mine"} | with_prefixes(buffers | {"1.weight"})
    ignore_in_ddp(model, nn.BatchNorm1d)
    assert model._ddp_params_and_buffers_to_ignore is names, "a second call changes nothing"
    assert set(copy.deepcopy(model)._ddp_params_and_buffers_to_ignore) == set(names)
    assert not set(FrozenNames(model, Int4Linear, []))


def test_a_model_that_nobody_needs_is_freed_at_once() -> None:
    """Without a garbage collection: a model's memory must not wait for one."""
    model = nn.Linear(2, 2)
    ignore_in_ddp(model)
    gone, twin = weakref.ref(model), copy.deepcopy(model)
    assert set(twin._ddp_params_and_buffers_to_ignore) == set(model._ddp_params_and_buffers_to_ignore)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert twin.weight.requires_grad
