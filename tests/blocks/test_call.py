"""Arguments as leaves, and what blocks pass on beside their hidden state in dictionaries and lists."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import UserDict
from typing import Any

import pytest
import torch
from models import relative_rms
from torch import Tensor, nn
from transformers import DynamicCache

from mebp_triton.blocks.call import Arguments, Call, map_caches
from mebp_triton.blocks.engine import BlockEngine


class Sharing(nn.Module):
    """Block 0 and 2 store a key; the one after it reads it, and block 1 replaces it by a mean as well."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.key, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, hidden_states: Tensor, shared: Any = None, name: Any = "key") -> Tensor:
        if self.index % 2 == 0:
            key = torch.tanh(self.key(hidden_states))
            shared[name] = (key, "not a tensor")
        else:
            key, _ = shared[name]
            if self.index == 1:
                shared[name + 1 if name == 0 else "mean"] = key.mean(0)
                key = key * self.key(hidden_states)
        return hidden_states + self.out(key)


class Model(nn.Module):
    def __init__(self, block: Any = Sharing) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block(index) for index in range(4)).double()

    def forward(self, x: Tensor, shared: Any, name: Any = "key") -> Tensor:
        for block in self.blocks:
            x = block(x, shared=shared, name=name)
        kept = list(shared.values()) if hasattr(shared, "values") else shared
        return x.square().sum() + sum(value[0].sum() for value in kept)


X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
CONTAINERS: dict[str, Any] = {
    "dict": (dict, "key"),
    "mapping": (UserDict, "key"),
    "list": (lambda: [(torch.zeros(1), None), (torch.zeros(1), None)], 0),
}


def gradients(model: Model, container: str) -> list[Tensor]:
    make, name = CONTAINERS[container]
    model.zero_grad()
    model(X, make(), name).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_blocks_share_by_a_container_has_its_gradient(container: str) -> None:
    plain = Model()
    truth = gradients(plain, container)
    ours = copy.deepcopy(plain)
    BlockEngine(ours.blocks)
    for _ in range(2):
        found = gradients(ours, container)
        assert len(found) == len(truth)
        assert all(relative_rms(left, right) < 1e-14 for left, right in zip(found, truth, strict=True))


@pytest.mark.parametrize("mode", ["exact", "identity"])
def test_blocks_that_are_not_selected(mode: Any) -> None:
    """Exact: as if frozen. Identity, by definition: the gradient is that of the residual connection, and no other."""
    plain = Model()
    ours = copy.deepcopy(plain)
    engine = BlockEngine(ours.blocks)
    engine.treatment = lambda index: "train" if index in (0, 3) else mode
    found = gradients(ours, "dict")
    if mode == "exact":
        for index in (1, 2):
            plain.blocks[index].requires_grad_(False)
        truth = gradients(plain, "dict")
    else:
        x, shared = X, dict[str, Any]()
        for index, block in enumerate(plain.blocks):
            if index in (0, 3):
                x = block(x, shared=shared)
                continue
            inner = copy.copy(shared)
            with torch.no_grad():
                out = block(x, shared=inner)
            shared |= {key: value for key, value in inner.items() if shared.get(key) is not value}
            x = x + (out - x).detach()
        (x.square().sum() + sum(value[0].sum() for value in shared.values())).backward()
        truth = [p.grad for p in plain.parameters() if p.grad is not None]
    assert len(found) == len(truth) == 6
    assert all(relative_rms(left, right) < 1e-14 for left, right in zip(found, truth, strict=True))


def test_without_gradients_the_container_is_filled_as_ever() -> None:
    plain = Model()
    ours = copy.deepcopy(plain)
    BlockEngine(ours.blocks)
    containers: list[Any] = []
    with torch.no_grad():
        for model in (plain, ours):
            containers.append({})
            model(X, containers[-1])
    assert containers[0].keys() == containers[1].keys() == {"key", "mean"}
    assert torch.equal(containers[0]["mean"], containers[1]["mean"])


def test_nothing_stays_behind_after_a_step() -> None:
    model = Model()
    BlockEngine(model.blocks)
    seen = []

    class Noted(UserDict):  # type: ignore[type-arg]
        def __setitem__(self, key: Any, value: Any) -> None:
            seen.extend(weakref.ref(item) for item in value if isinstance(item, Tensor))
            super().__setitem__(key, value)

    model(X, Noted()).backward()
    gc.collect()
    assert seen and all(reference() is None for reference in seen)


# --- alone ----------------------------------------------------------------------------------------------------------


def test_arguments_are_taken_apart_and_put_together_with_other_leaves() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    shared = {"k": [b, "text"]}
    arguments = Arguments((a, 3, (c,)), {"shared": shared, "flag": None})
    assert any(leaf is b for leaf in arguments.leaves) and arguments.containers == [shared]
    other = [2 * leaf if isinstance(leaf, Tensor) else leaf for leaf in arguments.leaves]
    call = arguments.call(other)
    assert torch.equal(call.args[0], 2 * a) and call.args[1] == 3 and torch.equal(call.args[2][0], 2 * c)
    assert call.kwargs["flag"] is None and call.kwargs["shared"] is not shared
    assert torch.equal(call.kwargs["shared"]["k"][0], 2 * b) and shared["k"][0] is b
    call.kwargs["shared"]["new"] = 1
    assert "new" not in arguments.call(other).kwargs["shared"], "each call has containers of its own"
    holder = object()
    again = Arguments((a, holder), {"shared": shared}).objects(call)
    assert again[0] is call.kwargs["shared"] and again[1] is holder and len(again) == 2


def test_a_call_sees_what_is_written_and_nothing_else() -> None:
    kept, replaced = torch.ones(1), torch.ones(2)
    mapping, items = {"kept": kept, "replaced": replaced}, [1, 2]
    call = Call((), {}, [mapping, items])
    mapping["replaced"], mapping["new"], items[1] = torch.ones(2), 5, 7
    written = call.written()
    assert written == [{"replaced": mapping["replaced"], "new": 5}, {1: 7}]
    other = Call((), {}, [{}, [0, 0]])
    other.write(written)
    assert other.containers == [{"replaced": mapping["replaced"], "new": 5}, [0, 7]]


def test_caches_are_replaced_wherever_they_are() -> None:
    cache, x = DynamicCache(), torch.ones(1)
    args, kwargs = map_caches(lambda cache: "none", (x, cache), {"inner": (cache, 1), "shared": {"c": 2}})
    assert args[0] is x and args[1] == "none" and kwargs == {"inner": ("none", 1), "shared": {"c": 2}}
