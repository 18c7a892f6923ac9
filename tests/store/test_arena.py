"""Weights that are copied to a device while a block runs: the same gradients, read ahead, and gone afterwards."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, our_gradients, randomize_adapter, tiny_store
from stages import block_modules, staged

import mebp_triton as mebp
from mebp_triton.store import arena as arena_module
from mebp_triton.store.manifest import block_file
from mebp_triton.store.reader import Store


@pytest.fixture(scope="module")
def store() -> Path:
    return tiny_store("qwen2")


def loaded(store: Path) -> Any:
    model = mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8))
    randomize_adapter(model)
    return model


@pytest.fixture(scope="module")
def truth(store: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss and gradients with the weights on the device throughout."""
    model = loaded(store)
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach(), our_gradients(model)


@pytest.fixture
def model(store: Path) -> Any:
    return loaded(store)


@pytest.mark.parametrize("residency", ["host", "file"])
def test_two_arenas_for_all_blocks_give_the_same_gradients(model: Any, truth: Any, residency: Any) -> None:
    """A block's bytes are copied in when it runs, or before, over those of another."""
    stager = staged(model, residency)
    opened: Store = model.mebp.store
    for _ in range(2):
        model.zero_grad()
        loss = model(**batch()).loss
        assert all(m.int4().device.type == "meta" for i in range(3) for m in block_modules(model, i).values())
        loss.backward()
        assert all(torch.equal(our_gradients(model)[name], grad) for name, grad in truth[1].items())
    largest = max(opened.files[block_file(index)].data().numel() for index in range(3))
    assert [arena.buffer.numel() for arena in stager.arenas] == [largest] * 2
    assert model.mebp.engine.waiting.pop_seconds() > 0
    with torch.no_grad():
        assert torch.equal(model(**batch()).loss, truth[0])


def test_the_next_block_is_read_while_this_one_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, in the order of the forward and of the backward pass; those passed by are not read."""
    staged(model, "file")
    events: list[tuple[str, int]] = []
    read = arena_module.ArenaPages.read

    def note(entered: arena_module.ArenaPages, target: torch.Tensor) -> None:
        assert threading.current_thread() is not threading.main_thread()
        events.append(("read", int(entered.file.path.stem[-1])))
        read(entered, target)

    monkeypatch.setattr(arena_module.ArenaPages, "read", note)
    model.mebp.engine.observer = lambda event, index: events.append((event, index))
    model(**batch()).loss.backward()
    order = [index for event, index in events if event == "read"]
    # 2 and 1 are still there when the backward pass begins, and 0 is when the next step does.
    assert order == [0, 1, 2, 0]
    sizes = [model.mebp.store.files[block_file(index)].data().numel() for index in order]
    assert model.mebp.engine.waiting.pop_paged() == sum(sizes)
    assert events.index(("read", 1)) < events.index(("forward", 1))
    events.clear()
    model.mebp.engine.treatment = lambda index: "identity" if index == 1 else "train"
    model(**batch()).loss.backward()
    assert [index for event, index in events if event == "read"] == [2, 0]


def test_a_slow_reader_is_waited_for(model: Any, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(model, "file")
    read = arena_module.ArenaPages.read

    def slow(entered: arena_module.ArenaPages, target: torch.Tensor) -> None:
        target.fill_(255)
        time.sleep(0.05)
        read(entered, target)

    monkeypatch.setattr(arena_module.ArenaPages, "read", slow)
    assert torch.equal(model(**batch()).loss, truth[0])
    assert model.mebp.engine.waiting.pop_seconds() >= 0.02  # some of the 0.05 may have passed before


def test_an_error_of_the_reader_ends_the_step_and_the_next_one_reads_again(
    model: Any, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged(model, "file")

    def fail(entered: arena_module.ArenaPages, target: torch.Tensor) -> None:
        raise OSError("input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(arena_module.ArenaPages, "read", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="input/output"):
                model(**batch())
    assert torch.equal(model(**batch()).loss, truth[0])


def test_a_weight_used_outside_its_block_is_an_error_not_another_blocks_weight(model: Any) -> None:
    staged(model, "file")
    layer = block_modules(model, 0)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(1, 48)
    with model.mebp.engine.pages[0]:
        inside = layer(x)
    assert inside.device.type == "cpu"
    with pytest.raises(ValueError, match="the int4 weight on meta"):
        layer(x)


@pytest.mark.parametrize("residency", ["host", "file"])
def test_a_copy_has_arenas_of_its_own(model: Any, truth: Any, residency: Any) -> None:
    stager = staged(model, residency)
    twin = copy.deepcopy(model)
    pages = twin.mebp.engine.pages
    assert len({page.stager for page in pages}) == 1 and pages[0].stager is not stager
    assert all(page.host is old.host for page, old in zip(pages, model.mebp.engine.pages, strict=True))
    for one in (model, twin):  # both run
        loss = one(**batch()).loss
        loss.backward()
        assert torch.equal(loss, truth[0])
    gradients = our_gradients(twin)
    assert all(torch.equal(gradients[name], wanted) for name, wanted in truth[1].items())
    assert len(pages[0].stager.arenas) == 2 and all(arena not in stager.arenas for arena in pages[0].stager.arenas)
