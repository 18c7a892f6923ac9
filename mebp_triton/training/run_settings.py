"""Turns what a user asked for (``TrainConfig``) into what runs (``RunSettings``), with every open choice made."""

from __future__ import annotations

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
    return RunSettings(**values)
