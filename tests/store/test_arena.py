"""Weights brought in while a block runs, and gone after it."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import batch, our_gradients, randomize_adapter, tiny_store

import mebp_triton as mebp
from mebp_triton.layers.int4_module import Int4Module
from mebp_triton.store import arena as arena_module
from mebp_triton.store import placement
from mebp_triton.store.manifest import SHARED, block_file
from mebp_triton.store.reader import Store
from mebp_triton.system.memory import resident


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


def staged(model: Any, residency: Any) -> arena_module.Stager:
    """The model's blocks in arenas, as on a device that is not the CPU."""
    device, waiting = torch.device("cpu"), model.mebp.engine.waiting
    sizes = [model.mebp.store.files[block_file(index)].data().numel() for index in range(3)]
    stager = arena_module.Stager(device, waiting, max(sizes))
    model.mebp.engine.pages = [
        placement.place_weights(
            model.mebp.store, block_file(index), block_modules(model, index), residency, device, stager, waiting
        )
        for index in range(3)
    ]
    return stager


@pytest.mark.parametrize("residency", ["host", "file"])
def test_two_arenas_for_all_blocks_give_the_same_gradients(store: Path, residency: Any) -> None:
    """A block's bytes are copied in when it runs, or before, over those of another."""
    truth = loaded(store)
    truth(**batch()).loss.backward()
    model = loaded(store)
    stager = staged(model, residency)
    opened: Store = model.mebp.store
    for _ in range(2):
        model.zero_grad()
        loss = model(**batch()).loss
        assert all(m.int4().device.type == "meta" for i in range(3) for m in block_modules(model, i).values())
        loss.backward()
        assert all(torch.equal(our_gradients(model)[name], grad) for name, grad in our_gradients(truth).items())
    largest = max(opened.files[block_file(index)].data().numel() for index in range(3))
    assert [arena.buffer.numel() for arena in stager.arenas] == [largest] * 2
    assert model.mebp.engine.waiting.pop_seconds() > 0
    with torch.no_grad():
        assert torch.equal(model(**batch()).loss, truth(**batch()).loss)


def test_the_next_block_is_read_while_this_one_runs(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, in the order of the forward and of the backward pass; those passed by are not read."""
    model = loaded(store)
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
    assert events.index(("read", 1)) < events.index(("forward", 1))
    events.clear()
    model.mebp.engine.treatment = lambda index: "identity" if index == 1 else "train"
    model(**batch()).loss.backward()
    assert [index for event, index in events if event == "read"] == [2, 0]


def test_a_slow_reader_is_waited_for(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = loaded(store)
    expected = truth(**batch()).loss
    model = loaded(store)
    staged(model, "file")
    read = arena_module.ArenaPages.read

    def slow(entered: arena_module.ArenaPages, target: torch.Tensor) -> None:
        target.fill_(255)
        time.sleep(0.05)
        read(entered, target)

    monkeypatch.setattr(arena_module.ArenaPages, "read", slow)
    assert torch.equal(model(**batch()).loss, expected)
    assert model.mebp.engine.waiting.pop_seconds() >= 0.05


def test_an_error_of_the_reader_ends_the_step_and_the_next_one_reads_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(store)
    expected = model(**batch()).loss
    staged(model, "file")

    def fail(entered: arena_module.ArenaPages, target: torch.Tensor) -> None:
        raise OSError("input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(arena_module.ArenaPages, "read", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="input/output"):
                model(**batch())
    assert torch.equal(model(**batch()).loss, expected)


def test_a_weight_used_outside_its_block_is_an_error_not_another_blocks_weight(store: Path) -> None:
    model = loaded(store)
    staged(model, "file")
    layer = block_modules(model, 0)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(1, 48)
    with model.mebp.engine.pages[0]:
        inside = layer(x)
    assert inside.device.type == "cpu"
    with pytest.raises(ValueError, match="the int4 weight on meta"):
        layer(x)


def test_pages_in_a_mapped_file_are_resident_only_within(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    mebp.quantize(str(directory), tmp_path / "store", scale_search=False)
    model = mebp.load(tmp_path / "store", weights="file")
    pages_of_block = model.mebp.engine.pages[0]
    size = model.mebp.store.files[block_file(0)].data().numel()
    with pages_of_block:  # the first time, checksums are compared
        pass
    before = resident().file_backed
    with pages_of_block:
        within = resident().file_backed
    assert size > 2 << 20 and within - before >= size * 0.95
    assert resident().file_backed - before < size * 0.05


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


def test_a_host_copy_is_verified(store: Path, tmp_path: Path) -> None:
    """Of the embedding too, whose file may have no other reader."""
    damaged = tmp_path / "store"
    shutil.copytree(store, damaged)
    data = bytearray((damaged / SHARED).read_bytes())
    data[-20] ^= 1
    (damaged / SHARED).write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        placement.host_copy(Store(damaged).files[SHARED], torch.device("cpu"))


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
