"""PEFT adapts the layers that we did, and no others, by the config that we write."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import batch, decoded_model, loaded
from transformers import AutoConfig, AutoModelForCausalLM

import mebp_triton as mebp
from mebp_triton.models.adapter import adapter_tensors, load_adapter, read_adapter_config

needs_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules in transformers 4")
# Architectures of which PEFT refuses some layers, or that have parameters of other forms.
UNUSUAL: list[Any] = ["falcon_h1", "gemma4_text", "granitemoe", "mamba2", "nemotron_h"]
# Mixtures whose shared experts and dense blocks have layers by the names that experts had in transformers 4.
SHARED = [pytest.param(name, marks=needs_5) for name in ("deepseek_v3", "qwen3_next", "qwen3_moe")]


@pytest.mark.parametrize("architecture", UNUSUAL + SHARED)
def test_an_adapter_of_all_layers_loads_in_peft(shared_store: Any, tmp_path: Path, architecture: str) -> None:
    """PEFT raises where it refuses a layer, and warns of keys that it misses or does not know."""
    store = shared_store(architecture)
    model = loaded(store)
    mebp.save_adapter(model, tmp_path)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(store), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wrapped = peft.PeftModel.from_pretrained(base, tmp_path)
    theirs, ours = peft.get_peft_model_state_dict(wrapped), adapter_tensors(model)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("architecture", SHARED)
def test_layers_that_peft_takes_for_experts_are_named_by_their_weight(
    shared_store: Any, tmp_path: Path, architecture: str
) -> None:
    """With ranks and alphas of their own; and we read such a config as any other."""
    store, batches = shared_store(architecture), batch()
    patterns = {"rank_pattern": {"down_proj": 2, "o_proj": 3}, "alpha_pattern": {"gate_proj": 5.0}}
    model = loaded(store, patterns)
    mebp.save_adapter(model, tmp_path)
    named = json.loads((tmp_path / "adapter_config.json").read_text())
    shared = [name for name in adapter_tensors(model) if "gate_proj" in name]
    assert bool(shared) == bool(named["target_parameters"])
    assert not {"gate_proj", "up_proj", "down_proj"} & set(named["target_modules"])
    wrapped = peft.PeftModel.from_pretrained(decoded_model(store), tmp_path)
    again = mebp.load(store, read_adapter_config(tmp_path))
    load_adapter(again, tmp_path)
    with torch.no_grad():
        truth = model(**batches).loss.item()
        assert again(**batches).loss.item() == truth
        assert abs(wrapped(**batches, use_cache=False).loss.item() - truth) < 1e-5 * truth
