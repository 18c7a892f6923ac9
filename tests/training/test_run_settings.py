"""What runs: every choice that was left open is made, by a plan or for this machine, and what was asked stays."""

import dataclasses

import pytest
import torch

from mebp_triton.system.machine import resolve_device
from mebp_triton.training.run_settings import RunSettings, resolve
from mebp_triton.training.settings import FACTS, TrainConfig

OPEN = [name for name, facts in FACTS.items() if facts.on_cpu is not None]


def test_no_choice_is_left_open():
    settings = resolve(TrainConfig(device="cpu"))
    assert isinstance(settings, RunSettings) and {"weights", "dtype", "mlp_chunk_tokens"} <= set(OPEN)
    assert not [name for name in (*OPEN, "device") if getattr(settings, name) is None]
    assert all(FACTS[name].on_gpu is not None for name in OPEN)
    declared = RunSettings.__annotations__
    assert declared.keys() == {*OPEN, "device", "join_micro_batches"} and not [
        name for name in declared if "None" in declared[name]
    ]


def test_what_is_chosen_wins_over_what_was_asked_and_that_over_the_machine():
    asked = TrainConfig(device="cpu", weights="device", checkpoints="host")
    settings = resolve(asked, checkpoints="device", mlp_chunk_tokens=64)
    assert (settings.weights, settings.checkpoints, settings.optimizer_state) == ("device", "device", "file")
    assert settings.mlp_chunk_tokens == 64 and settings.max_length == asked.max_length
    with pytest.raises(ValueError, match="weights must be one of device, host, file, got 'disk'"):
        resolve(asked, weights="disk")


def test_what_runs_can_be_changed_and_resolved_again():
    settings = resolve(TrainConfig(device="cpu", lora_r=4))
    assert resolve(settings) == settings
    assert resolve(dataclasses.replace(settings, lora_r=8)) == resolve(TrainConfig(device="cpu", lora_r=8))


def test_on_a_cpu_everything_lies_in_files():
    config = resolve(TrainConfig(device="cpu", checkpoints="host"))
    assert (config.device, config.dtype) == ("cpu", "float32")
    assert (config.weights, config.checkpoints, config.optimizer_state) == ("file", "host", "file")
    assert (config.mlp_chunk_tokens, config.return_freed_memory) == (0, False)
    assert config.recompute_granularity == "full"  # a plan may choose otherwise
    assert resolve(TrainConfig(device="cpu", return_freed_memory=False)).return_freed_memory is False
    assert resolve(config) == config
    kept = resolve(TrainConfig(device="cpu", dtype="bfloat16", weights="device"))
    assert (kept.dtype, kept.weights) == ("bfloat16", "device")


def test_on_a_gpu_everything_lies_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = resolve(TrainConfig())
    assert (config.device, config.dtype) == ("cuda", "bfloat16")
    assert (config.weights, config.checkpoints, config.optimizer_state) == ("device",) * 3
    assert config.return_freed_memory is False
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="device 'cuda:2' is not here: torch sees 2 GPUs"):
        resolve_device("cuda:2")


def test_micro_batches_are_joined_where_weights_are_paged(monkeypatch):
    def joined(**asked):
        return resolve(TrainConfig(**{"gradient_accumulation_steps": 2, "device": "cpu"} | asked)).join_micro_batches

    assert joined() and not joined(gradient_accumulation_steps=1)
    assert [joined(weights=place) for place in ("device", "host", "file")] == [False, False, True]
    assert joined(weights="device", join_micro_batches=True) and not joined(join_micro_batches=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [joined(weights=place, device="cuda") for place in ("device", "host", "file")] == [False, True, True]


def test_a_device_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device(None) == "cpu"
    with pytest.raises(ValueError, match="device 'cuda' is not here: torch sees 0 GPUs"):
        resolve(TrainConfig(device="cuda"))
    for name in ("gpu", "meta", "mps", "", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CPU"):
        with pytest.raises(ValueError, match=f"device must be cpu, cuda or cuda:N, got {name!r}"):
            resolve(TrainConfig(device=name))
