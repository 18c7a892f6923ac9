"""Which results count as the block's own. What ``warm_up`` refuses is tested in ``test_graphs``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mebp_triton.blocks.graph_checks import agrees, bits_differ

X = torch.tensor([1.0, float("nan"), 3.0])


def never() -> Any:
    raise AssertionError("the block need not run again")


def test_the_same_bits_agree() -> None:
    assert agrees((X.clone(), None, "a"), (X, None, "a"), never)
    assert agrees([], [], never)


@pytest.mark.parametrize(
    "other",
    [
        (X.double(), 1),
        (X[:2], 1),
        (X, 2),
        (X, None),
        (X,),
        (None, 1),
        (torch.tensor([1.0, float("nan"), 3.0000002]), 1),
    ],
)
def test_other_bits_do_not(other: Any) -> None:
    assert bits_differ(other, (X, 1))
    assert not agrees(other, (X, 1), lambda: (X.clone(), 1))


def test_a_block_that_adds_up_in_any_order_has_a_spread() -> None:
    truth = torch.ones(1000)

    def off(by: float) -> tuple[Tensor]:
        return (truth + by,)

    assert agrees(off(2e-6), (truth,), lambda: off(1e-6))
    assert not agrees(off(8e-6), (truth,), lambda: off(1e-6))
    assert not agrees(off(2e-6), (truth,), lambda: off(0.0))
    assert not agrees(off(2e-6), (truth,), lambda: off(float("nan")))
    assert not agrees(off(float("nan")), (truth,), lambda: off(1e-6))
    assert not agrees((*off(2e-6), *off(float("nan"))), (truth, truth), lambda: (*off(1e-6), truth))
