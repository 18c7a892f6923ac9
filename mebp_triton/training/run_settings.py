"""Turns what a user asked for (``TrainConfig``) into what runs (``RunSettings``), with every open choice made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mebp_triton.blocks.options import Granularity
from mebp_triton.kernels.names import FloatName
from mebp_triton.store.residency import Residency
from mebp_triton.system.machine import resolve_device

from .settings import FACTS, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunSettings(TrainConfig):
    """The settings of a run: a ``TrainConfig`` in which no choice is left open. ``resolve`` makes it."""

    device: str
    dtype: FloatName
    weights: Residency
    checkpoints: Residency
    optimizer_state: Residency
    recompute_granularity: Granularity
    mlp_chunk_tokens: int
    join_micro_batches: bool
    return_freed_memory: bool


def resolve(asked: TrainConfig, **chosen: Any) -> RunSettings:
    """Makes every choice: a setting is as ``chosen``, else as ``asked``, else this machine's default for it.

    Args:
        asked: what the user asked for; a ``RunSettings`` comes back as it is.
        chosen: settings that a plan has chosen, by name.

    Raises:
        ValueError: this machine does not have the device, or what was chosen contradicts another setting.
    """
    values = vars(asked) | chosen
    values["device"] = resolve_device(values["device"])
    for name, facts in FACTS.items():
        if values[name] is None:
            values[name] = facts.on_cpu if values["device"] == "cpu" else facts.on_gpu
    if values["join_micro_batches"] is None:
        values["join_micro_batches"] = values["gradient_accumulation_steps"] > 1 and are_paged(values)
    return RunSettings(**values)


def are_paged(settings: Mapping[str, Any]) -> bool:
    """Whether blocks' weights are brought in for each pass: a CPU computes with those in host memory where they lie."""
    return settings["weights"] == "file" or (settings["weights"] == "host" and settings["device"] != "cpu")
