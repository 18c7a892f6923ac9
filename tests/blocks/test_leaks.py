"""Tensors that a block leaves where its outputs are not: refused or warned of, if they would lose their gradient."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mebp_triton.blocks.engine import BlockEngine
from mebp_triton.blocks.leaks import check_modules, check_objects

X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)


class Holder:
    pass


class Leaving(nn.Module):
    """Leaves ``key`` where ``where`` says."""

    def __init__(self, where: str, shared: nn.Module) -> None:
        super().__init__()
        self.where, self.key, self.module = where, nn.Linear(6, 6), nn.Linear(6, 6)
        if where == "shared":
            self.module = shared

    def forward(self, hidden_states: Tensor, thing: Any) -> Tensor:
        key = self.key(hidden_states)
        kept = key if self.where != "plain" else key.detach()
        if self.where in ("object", "plain"):
            thing.states = {"key": [kept]}
        elif self.where == "nested":
            thing["lists"].append(kept)
        else:
            self.module.state = (kept,)
        return hidden_states + self.module(key)


def leaving(where: str) -> tuple[nn.ModuleList, Any]:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    blocks = nn.ModuleList(Leaving(where, shared) for _ in range(2)).double()
    BlockEngine(blocks)
    return blocks, {"lists": []} if where == "nested" else Holder()


def step(blocks: nn.ModuleList, thing: Any) -> None:
    blocks[1](blocks[0](X, thing), thing).sum().backward()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("object", "block 1 leaves a tensor in its argument Holder without its gradient"),
        ("nested", "block 1 leaves a tensor in its argument dict without its gradient"),
        ("shared", "block 1 leaves a tensor in module.state without its gradient"),
    ],
)
def test_tensors_that_others_may_read_are_refused(where: str, message: str) -> None:
    blocks, thing = leaving(where)
    with pytest.raises(ValueError, match=message):
        step(blocks, thing)


def test_a_state_of_the_blocks_own_is_warned_of_once() -> None:
    blocks, thing = leaving("own")
    with pytest.warns(UserWarning, match=r"block 0 leaves a tensor in module\.state"):
        step(blocks, thing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(blocks, thing)


def test_what_has_no_gradient_may_be_left_anywhere() -> None:
    blocks, thing = leaving("plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(blocks, thing)
    assert isinstance(thing.states["key"][0], Tensor)


MADE = torch.ones(2, requires_grad=True) * 2


@pytest.mark.parametrize("thing", [[MADE], {"a": (MADE,)}, ({"b": [{1: MADE}]},), {"set": {MADE}}], ids=str)
def test_containers_are_looked_into(thing: Any) -> None:
    with pytest.raises(ValueError, match="block 3 leaves a tensor in its argument"):
        check_objects(3, [thing], [])
    check_objects(3, [thing], [MADE])  # an output may be anywhere


def test_leaves_and_deep_containers_are_not_refused() -> None:
    """A parameter has no graph; and what lies deeper than four levels is not looked for."""
    check_objects(0, [[torch.ones(2, requires_grad=True)], [[[[[MADE]]]]]], [])
    module = nn.Linear(2, 2)
    check_modules(0, [module])
