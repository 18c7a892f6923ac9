"""Weights brought in while a block runs, and gone after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, our_gradients, randomize_adapter, tiny_store

import mebp_triton as mebp
from mebp_triton.lora import Int4Module
from mebp_triton.stores import pages
from mebp_triton.stores.format import Store, block_file


@pytest.fixture(scope="module")
def store() -> Path:
    return tiny_store("qwen2")


def loaded(store: Path, **options: Any) -> Any:
    model = mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8), **options)
    randomize_adapter(model)
    return model


def block_modules(model: Any, index: int) -> dict[str, Int4Module]:
    prefix = f"model.layers.{index}."
    return {name: m for name, m in model.named_modules() if isinstance(m, Int4Module) and name.startswith(prefix)}


@pytest.mark.parametrize("residency", ["host", "file"])
def test_one_arena_for_all_blocks_gives_the_same_gradients(store: Path, residency: Any) -> None:
    """As on a device that is not the CPU: a block's bytes are copied in when it runs, over the block before."""
    truth = loaded(store)
    truth(**batch()).loss.backward()
    model = loaded(store)
    arena = pages.Arena(torch.device("cpu"))
    opened: Store = model.mebp.store
    model.mebp.engine.pages = [
        pages.place_weights(
            opened, block_file(index), block_modules(model, index), residency, torch.device("cpu"), arena
        )
        for index in range(3)
    ]
    for _ in range(2):
        model.zero_grad()
        loss = model(**batch()).loss
        assert all(m.int4().device.type == "meta" for i in range(3) for m in block_modules(model, i).values())
        loss.backward()
        assert all(torch.equal(our_gradients(model)[name], grad) for name, grad in our_gradients(truth).items())
    largest = max(opened.files[block_file(index)].data().numel() for index in range(3))
    assert arena.buffer.numel() == largest
    with torch.no_grad():
        assert torch.equal(model(**batch()).loss, truth(**batch()).loss)


def test_a_weight_used_outside_its_block_is_an_error_not_another_blocks_weight(store: Path) -> None:
    model = loaded(store)
    arena = pages.Arena(torch.device("cpu"))
    modules = block_modules(model, 0)
    entered = pages.place_weights(model.mebp.store, block_file(0), modules, "file", torch.device("cpu"), arena)
    layer = modules["model.layers.0.self_attn.q_proj"]
    x = torch.randn(1, 48)
    with entered:
        inside = layer(x)
    assert inside.device.type == "cpu"
    with pytest.raises(ValueError, match="the int4 weight on meta"):
        layer(x)


@pytest.mark.parametrize("weights", ["device", "host", "file"])
def test_a_flipped_bit_is_found_on_first_use(weights: Any, tmp_path: Path) -> None:
    damaged = tiny_store("llama", tmp_path)
    file = damaged / block_file(1)
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match="block-00001.* is damaged"):
        model = loaded(damaged, weights=weights)
        model(**batch())


def test_a_file_that_shrinks_while_mapped_is_an_error(tmp_path: Path) -> None:
    shrinking = tiny_store("llama", tmp_path)
    model = loaded(shrinking, weights="file")
    model(**batch()).loss.backward()
    file = shrinking / block_file(2)
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    with pytest.raises(ValueError, match="cut short"):
        model(**batch())


def test_unknown_residency(store: Path) -> None:
    with pytest.raises(ValueError, match="weights must be one of device, host, file, got 'disk'"):
        mebp.load(store, weights="disk")
    with pytest.raises(ValueError, match="checkpoints must be one of"):
        mebp.load(store, checkpoints="disk")
