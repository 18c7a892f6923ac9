"""The layers of a model that get an adapter, checked against what the user named."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mebp_triton.layers.lora_config import ALL_AND_EXPERTS, ALL_LINEAR, LoraConfig

from .direct_reads import directly_read
from .discover import unreached_by_text
from .names import enumerate_names
from .skeleton import Stored, int4_sites, linear_names


def check_targets(config: LoraConfig, linear: list[str], model: Any, experts: Collection[str] = ()) -> None:
    """Compares the targets of an adapter with the names of a model's linear layers and of its experts.

    Args:
        config: the adapter's settings.
        linear: the paths of the linear layers that may have an adapter.
        model: the model.
        experts: the paths of the parameters whose experts may have adapters.

    Raises:
        ValueError: one of the targets selects no layer, as a mistyped name does; or experts cannot have dropout.
    """
    targets, name = config.target_modules, type(model).__name__
    if targets == ALL_AND_EXPERTS and not experts:
        raise ValueError(f"target_modules {targets!r}: no experts of {name} can have adapters here; use {ALL_LINEAR}")
    parameters = [*experts, *(f"{path}.weight" for path in linear)]
    for target in config.target_parameters or ():
        if not any(path == target or path.endswith(f".{target}") for path in parameters):
            raise ValueError(f"target_parameters {target!r} matches no experts of {name} that can have adapters here")
    if config.lora_dropout and any(map(config.targets_parameter, experts)):
        raise ValueError(f"lora_dropout must be 0 where experts get adapters, as in PEFT, got {config.lora_dropout}")
    for target in [targets] if isinstance(targets, str) and targets else targets:
        alone = dataclasses.replace(config, target_modules=target if target is targets else [target])
        if not any(alone.targets(name) for name in linear):
            raise ValueError(f"target_modules {target!r} {_no_match(alone, model)}")


def _no_match(config: LoraConfig, model: Any) -> str:
    """Why no layer that may have an adapter is a target of ``config``."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head and config.targets(name):
            return f"matches only layers that stay float, such as {name}, and get no adapter: leave it out"
    return f"matches no linear layer (but the head) of {type(model).__name__}"


def resolve_targets(config: LoraConfig, model: Any, stored: Stored, blocks: str) -> LoraConfig:
    """Checks the targets of an adapter against a model, and finds the layers that "all-linear" stands for.

    It leaves out those that text never reaches, and those whose weight is read directly, which older stores have in
    int4. An adapter that names such layers has them, and a warning says so. Layers that ``config`` lists are kept.

    Args:
        config: the adapter's settings.
        model: a skeleton.
        stored: the store of the model.
        blocks: the path of the block list in the model.

    Raises:
        ValueError: see ``check_targets``.
    """
    sites, _ = int4_sites(model, stored)
    linear = linear_names(sites)
    experts = {site.parameter for site in sites if site.role == "expert"}
    if config.layers is not None:  # where a run began with them, the names of experts' adapters are among them
        modules = {path.rpartition(".")[0] for path in experts}
        modules |= {f"{path}.base_layer" for path in modules}
        config = dataclasses.replace(config, layers=config.layers - modules)
    begun_with = config.takes_all_linear and config.layers is not None and config.layers <= set(linear)
    if not begun_with:
        config = dataclasses.replace(config, layers=None)
    check_targets(config, linear, model, experts)
    adapted = [path for path in linear if config.targets(path)] + [
        path for path in experts if config.targets_parameter(path)
    ]
    # Files name some layers by their weights.
    if unmatched := config.unmatched_patterns([*adapted, *(f"{path}.weight" for path in adapted)]):
        warnings.warn(
            f"{enumerate_names(unmatched)} matches no layer that gets an adapter, and changes nothing", stacklevel=3
        )
    read, unreached = directly_read(model), unreached_by_text(model.config, blocks, linear)
    on_read = [name for name in linear if name in read and config.targets(name)]
    on_unreached = [name for name in linear if name in unreached and config.targets(name)]
    parts = enumerate_names(sorted({".".join(name.split(".")[:2]) for name in on_unreached}))
    if config.takes_all_linear and not begun_with:
        if on_unreached:
            warnings.warn(
                f"{len(on_unreached)} linear layers that text never reaches get no adapter ({parts}): name them in "
                f"target_modules to train them on other inputs",
                stacklevel=3,
            )
        return dataclasses.replace(config, layers=frozenset(linear) - unreached - read)
    if on_read:
        warnings.warn(
            f"{len(on_read)} adapters lie on layers whose weight the modelling code reads itself "
            f"({enumerate_names(on_read, 1)}): fused kernels pass such an adapter by, and PEFT may refuse it",
            stacklevel=3,
        )
    if on_unreached:
        warnings.warn(
            f"target_modules names {len(on_unreached)} linear layers that text never reaches ({parts}): trained on "
            f"text, their adapters stay as they are",
            stacklevel=3,
        )
    return config
