"""Writes the config of an adapter so that PEFT adapts the same layers of its own model."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from mebp_triton.layers.experts import ExpertAdapter, Int4Experts
from mebp_triton.layers.linear import Int4LoRALinear
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.store.manifest import BaseModel

from .language_part import parts_left_out

# What PEFT takes for the layers of experts in the targets of an adapter, for models whose experts transformers 5 keeps
# in one tensor; by the name under which transformers has the rule for their checkpoints.
NAMES_OF_EXPERTS: dict[str | None, tuple[str, ...]] = {
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("gate", "w1", "w2", "w3"),
}

AdaptedLayer = Int4LoRALinear | ExpertAdapter


def adapter_layers(model: Any) -> dict[str, AdaptedLayer]:
    """The layers of ``model`` that have an adapter of ours, by path; of experts, the path of their parameter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def base_of(model: Any) -> tuple[BaseModel, str | None]:
    """The model beneath the adapter, and PEFT's type for its task."""
    if hasattr(model, "mebp"):
        # Where the store does not know its source, its own path is at least no name that the hub may have.
        store = model.mebp.store
        return store.base or BaseModel(os.path.abspath(store.directory)), "CAUSAL_LM"
    config: Any = getattr(model, "config", None)
    causal = hasattr(model, "can_generate") and model.can_generate() and not config.is_encoder_decoder
    return BaseModel(getattr(config, "name_or_path", "")), "CAUSAL_LM" if causal else None


def peft_config(config: LoraConfig, model: Any) -> dict[str, Any]:
    """The content of ``adapter_config.json`` by which PEFT adapts the layers that have an adapter in ``model``."""
    layers = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, Int4LoRALinear)}
    experts = [name for name, layer in adapter_layers(model).items() if isinstance(layer, ExpertAdapter)]
    by_weight = _mistaken_by_peft(model, layers)
    by_name = layers.keys() - by_weight
    targets: Any = config.target_modules
    # PEFT applies these names to its own model, where "all-linear" may mean other layers, and excluded modules are
    # written as none. So the config's own targets are kept only where they select just the adapted layers.
    # What is left out of the model may have layers of the same names, so there whole paths are written.
    if parts_left_out(model):
        targets = sorted(by_name)
    elif _selected(model, replace(config, exclude_modules=None, target_parameters=None)) != by_name:
        targets = _shortest_suffixes(model, by_name)
    parameters = _shortest_parameters(model, experts) + _shortest_weights(model, by_weight)
    base, task = base_of(model)
    return {
        "alpha_pattern": dict(config.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base.name_or_path,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_bias": False,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": base.revision,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "target_parameters": parameters or None,
        "task_type": task,
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def _shortest_suffixes(model: Any, layers: Collection[str]) -> list[str]:
    """The last parts of the layers' paths, or the whole paths where the last parts would select other layers too."""
    suffixes = sorted({name.rpartition(".")[2] for name in layers})
    exact = _selected(model, LoraConfig(target_modules=suffixes)) == set(layers)
    return suffixes if exact else sorted(layers)


def _selected(model: Any, config: LoraConfig) -> set[str]:
    """The paths of the modules that ``config`` targets. PEFT has no modules for the adapters of experts."""
    modules = model.named_modules()
    return {name for name, module in modules if not isinstance(module, ExpertAdapter) and config.targets(name)}


def _mistaken_by_peft(model: Any, layers: Collection[str]) -> set[str]:
    """The layers whose names PEFT would take for those of experts, as these were called in transformers 4.

    Shared experts and dense blocks have such names too. PEFT does not look at the weight of a linear layer so, when
    that is targeted as a parameter.
    """
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as PATTERNS
    except ImportError:  # transformers 4 has the experts of transformers 4
        return set()
    kind = PATTERNS.get(getattr(getattr(model, "config", None), "model_type", ""))
    return {name for name in layers if name.rpartition(".")[2] in NAMES_OF_EXPERTS.get(kind, ())}


def with_patterns_of_weights(config: LoraConfig, model: Any) -> LoraConfig:
    """The config with the ranks and alphas of layers that PEFT knows by their weight also under that name."""
    layers = adapter_layers(model)
    names = _mistaken_by_peft(model, [name for name in layers if isinstance(layers[name], Int4LoRALinear)])
    ranks = {rf"{re.escape(name)}\.weight": config.rank(name) for name in names if config.rank(name) != config.r}
    alphas = {
        rf"{re.escape(name)}\.weight": alpha for name in names if (alpha := config.alpha(name)) != config.lora_alpha
    }
    return replace(config, rank_pattern=config.rank_pattern | ranks, alpha_pattern=config.alpha_pattern | alphas)


def _shortest_weights(model: Any, layers: Collection[str]) -> list[str]:
    """The ends of the names of the layers' weights, or the whole names where others end so too."""
    every = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    ends = sorted({".".join(path.split(".")[-2:]) for path in layers})
    exact = {path for path in every if any(path.endswith(f".{end}") for end in ends)} == set(layers)
    return [f"{path}.weight" for path in (ends if exact else sorted(layers))]


def _shortest_parameters(model: Any, adapted: Collection[str]) -> list[str]:
    """The ends of the paths of adapted experts, or the whole paths where others end so too."""
    mixtures = {path: module for path, module in model.named_modules() if isinstance(module, Int4Experts)}
    every = {f"{path}.{name}" for path, module in mixtures.items() for name in (module.first, "down_proj")}
    ends = sorted({".".join(path.split(".")[-3:]) for path in adapted})
    exact = {path for path in every if any(path.endswith(f".{end}") for end in ends)} == set(adapted)
    return ends if exact else sorted(adapted)
