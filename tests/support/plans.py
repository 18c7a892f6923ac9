"""What tests of the planner share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mebp_triton.store.reader import Store
from mebp_triton.training.plan.inventory import Inventory
from mebp_triton.training.plan.planner import Plan, Planner

SMALL: dict[str, Any] = {"device": "cpu", "max_length": 32, "lora_r": 4}


def planner(store: Path, **options: Any) -> Planner:
    return Planner(Inventory.of_store(Store(store)), AutoConfig.from_pretrained(store), **options)


def at(plan: Plan, phase: str) -> dict[str, int]:
    """The components in a phase."""
    (components,) = [one.components for one in (plan.device or plan.host) if one.name == phase]
    return components
