"""What ``mebp plan`` and ``mebp train`` share: settings from arguments, a planner for a model, a plan in one line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mebp_triton.convert.readers import state_quantization
from mebp_triton.models.adapter_directory import find_adapter
from mebp_triton.store.manifest import MANIFEST
from mebp_triton.store.reader import Store
from mebp_triton.system.units import MIB
from mebp_triton.training.plan.inventory import Inventory
from mebp_triton.training.plan.planner import Plan, Planner
from mebp_triton.training.settings import CHOSEN, TrainConfig
from mebp_triton.training.settings_file import read_config_file

from .starting_adapter import fill_in, fill_in_from_run


def settings_of(arguments: argparse.Namespace) -> TrainConfig:
    """The settings that the flags and ``--config`` give; a choice that neither makes is left open (None).

    The shape of an adapter to start from is that adapter's; of a run that is resumed, that run's.
    """
    settings = read_config_file(arguments.config) if arguments.config else {}
    known = {item.name for item in dataclasses.fields(TrainConfig)}
    settings |= {name: value for name, value in vars(arguments).items() if name in known}
    if settings.get("adapter") is not None:
        settings["adapter"] = str(find_adapter(str(settings["adapter"])))  # YAML reads a directory 5 as a number
    checkpoint = getattr(arguments, "resume_from_checkpoint", None)
    if getattr(arguments, "resume", False):
        checkpoint = Path(str(settings.get("output_dir") or ".")) / "checkpoint"
    if checkpoint:
        settings = fill_in_from_run(settings, Path(checkpoint))
    elif settings.get("adapter"):
        settings = fill_in(settings)
    return TrainConfig(**settings)


def planner_of(given: Store | Path, config: Any, asked: Mapping[str, Any]) -> Planner:
    """A planner for a store, or for the store that would be made of a model directory or a ``config.json``.

    ``asked``: the form that the flags ask for; see ``flags.asked_form``.
    """
    if isinstance(given, Path) and (given / MANIFEST).exists():
        given = Store(given)
    if isinstance(given, Store):
        return Planner(Inventory.of_store(given), config)
    state_quantization(config, given)
    return Planner(Inventory.of_config(config, **asked), config)


def describe(plan: Plan) -> str:
    """The peak and what was chosen, in one line."""
    settings = plan.settings
    parts = [f"{name.replace('_', ' ')} {getattr(settings, name)}" for name in CHOSEN[:4]]
    if settings.mlp_chunk_tokens:
        parts.append(f"MLPs by {settings.mlp_chunk_tokens} tokens")
    if settings.join_micro_batches:
        parts.append("micro-batches joined")
    if settings.return_freed_memory:
        parts.append("freed memory returned")
    return f"planned peak {plan.peak / MIB:.0f} MiB: {', '.join(parts)}"
