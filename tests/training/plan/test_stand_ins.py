"""Stand-ins of a traced model do what they stand for, as far as memory goes."""

from __future__ import annotations

import gc
from typing import Any

import torch

from mebp_triton.store.block_inputs import DeviceBlockInputs
from mebp_triton.store.experts import ExpertPlaces
from mebp_triton.training.plan.stand_ins import AnyExperts, Counted, Elsewhere


def test_what_waits_is_counted() -> None:
    counted = Counted(DeviceBlockInputs())
    first, second = counted.save(torch.ones(3)), counted.save(torch.ones(5))
    assert counted.bytes == 32 and counted.saved == [12, 20] and second.load().shape == (5,)
    del first
    gc.collect()
    assert counted.bytes == 20 and counted.saved == [12, 20]


def test_what_waits_elsewhere_comes_back_with_its_shape() -> None:
    loaded = Elsewhere().save(torch.ones(2, 3, dtype=torch.bfloat16)).load()
    assert loaded.shape == (2, 3) and loaded.dtype == torch.bfloat16


def test_rows_are_spread_evenly_over_experts() -> None:
    class Store:
        def weight(self, name: str) -> str:
            return f"the weight {name}"

    class Holder:
        source: Any = None
        count: Any = None

    holder = Holder()
    experts = AnyExperts(ExpertPlaces(holder, [("a", "b"), ("c", "d"), ("e", "f")]), Store())
    assert holder.count(torch.zeros(7)) == [3, 2, 2] and holder.count(torch.zeros(2)) == [1, 1, 0]
    assert experts.pairs == 7
    assert holder.source.bring([0, 2]) == [("the weight a", "the weight b")] * 2
