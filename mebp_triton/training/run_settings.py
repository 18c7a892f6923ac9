"""Turns what was asked (``TrainConfig``) into what runs (``RunSettings``), with every open choice made."""

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
    """The settings of a run: those of ``TrainConfig``, of which none is left to be chosen. See ``resolve``."""

    device: str
    dtype: FloatName
    weights: Residency
    checkpoints: Residency
    optimizer_state: Residency
    recompute_granularity: Granularity
    mlp_chunk_tokens: int
    return_freed_memory: bool


def resolve(asked: TrainConfig, **chosen: Any) -> RunSettings:
    """The settings that run: each as ``chosen``, else as ``asked``, else as this machine's default for it.

    Args:
        asked: what the user asked for; a ``RunSettings`` comes back as it is.
        chosen: settings that a plan has chosen, by name; they win.

    Raises:
        ValueError: the device is not here, or what was chosen contradicts something else.
    """
    values = vars(asked) | chosen
    values["device"] = resolve_device(values["device"])
    for name, facts in FACTS.items():
        if values[name] is None:
            values[name] = facts.on_cpu if values["device"] == "cpu" else facts.on_gpu
    return RunSettings(**values)
