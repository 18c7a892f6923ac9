"""Finds the adapters that a run has not changed: no gradient reaches them, or their block was not selected yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mebp_triton.models.adapter import adapter_layers
from mebp_triton.models.names import enumerate_names


@dataclass(frozen=True)
class Untrained:
    """Layers whose adapter still adds nothing.

    Attributes:
        unreached: paths of layers that no step's gradient reached, although their block was selected.
        waiting: how many blocks no step has selected yet.
    """

    unreached: list[str]
    waiting: int


def describe_unreached(layers: list[str], steps: int) -> str:
    """A line about layers that no gradient reached."""
    have = "its adapter adds" if len(layers) == 1 else f"the adapters of these {len(layers)} layers add"
    return (
        f"no gradient came to {enumerate_names(layers)} in {steps} steps: {have} nothing; --exclude-modules leaves "
        f"such layers out"
    )


def untrained(model: Any, rows: Iterable[Mapping[str, Any]]) -> Untrained:
    """Looks for B matrices that are zero, as they begin: Adam changes every value that has ever had a gradient.

    Args:
        model: a model that ``mebp_triton.load`` made, with an adapter.
        rows: the lines of ``metrics.jsonl``.
    """
    engine = model.mebp.engine
    trained = {
        block
        for row in rows
        if not row.get("skipped") and row.get("learning_rate", 0) > 0
        for block in row.get("selected_blocks", ())
    }
    block_of = {id(part): index for index, block in enumerate(engine.blocks) for part in block.modules()}
    waiting = {index for index in block_of.values() if index not in trained}
    zero = {name: layer for name, layer in adapter_layers(model).items() if not layer.lora_B.any()}
    unreached = [name for name, layer in zero.items() if trained and block_of.get(id(layer)) not in waiting]
    return Untrained(unreached, len(waiting))
