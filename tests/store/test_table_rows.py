"""Embedding and head by their rows: the same numbers as with the whole table in place, and little of it resident."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, our_gradients, randomize_adapter, tiny_store
from stores import BLOCK, one_matrix

import mebp_triton as mebp
from mebp_triton.kernels.reference import decode
from mebp_triton.store.arena import Stager
from mebp_triton.store.manifest import SHARED
from mebp_triton.store.placement import host_copy
from mebp_triton.store.reader import Store
from mebp_triton.store.table_rows import SEGMENT_BYTES, SEGMENT_STEP, StoredRows, segment_rows
from mebp_triton.store.waiting import Waiting
from mebp_triton.system.memory import resident

CPU = torch.device("cpu")


@dataclass
class Table:
    """A model, and what it computes with its whole tables in place."""

    model: Any
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    logits: torch.Tensor
    logit_gradients: dict[str, torch.Tensor | None]


def backward(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return our_gradients(model)


@pytest.fixture(scope="module")
def tables() -> Callable[[str], Table]:
    @lru_cache
    def table(architecture: str) -> Table:
        model = mebp.load(tiny_store(architecture), mebp.LoraConfig(r=4, lora_alpha=8))
        randomize_adapter(model)
        examples = batch()
        loss = model(**examples).loss
        gradients = backward(model, loss)
        with torch.no_grad():
            logits = model(input_ids=examples["input_ids"]).logits
        through_logits = backward(model, model(input_ids=examples["input_ids"]).logits.square().mean())
        return Table(model, loss.detach(), gradients, logits, through_logits)

    return table


def walk(model: Any, how: str) -> None:
    """Lets the tables' rows come as ``how`` says: as on a CPU, or as to a device, from the file or the host."""
    waiting, store = Waiting(), model.mebp.store
    stager = None if how == "cpu" else Stager(CPU, waiting, 0)
    host = host_copy(store.files[SHARED], CPU) if how == "host" else None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if module in (embedding, head)}
    for name, module in names.items():
        if name in store.matrices:
            module.rows = StoredRows(store, name, CPU, stager, waiting, host, segment_bytes=1, segment_step=20)
    if store.tied_head:
        head.rows = embedding.rows


@pytest.mark.parametrize("how", ["cpu", "file", "host"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "granite", "phi", "gpt2"])
def test_loss_gradients_and_logits_are_those_of_the_whole_table(tables: Any, architecture: str, how: str) -> None:
    """Tied and untied heads, soft-capping, scaled logits, a bias."""
    whole = tables(architecture)
    model, examples = whole.model, batch()
    walk(model, how)
    assert len(model.get_output_embeddings().rows.spans) > 3
    loss = model(**examples).loss
    torch.testing.assert_close(loss, whole.loss, rtol=1e-6, atol=0)
    for name, gradient in backward(model, loss).items():
        torch.testing.assert_close(gradient, whole.gradients[name], rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        logits = model(input_ids=examples["input_ids"]).logits
    torch.testing.assert_close(logits, whole.logits, rtol=1e-5, atol=1e-6)


def test_gradients_through_real_logits(tables: Any) -> None:
    whole = tables("llama")
    walk(whole.model, "cpu")
    gradients = backward(whole.model, whole.model(input_ids=batch()["input_ids"]).logits.square().mean())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole.logit_gradients[name], rtol=1e-4, atol=1e-8)


def test_the_rows_of_a_segment() -> None:
    assert segment_rows(SEGMENT_BYTES // 5000) == 4 * SEGMENT_STEP  # 5000 rows would cut a tile of the loss
    assert segment_rows(SEGMENT_BYTES) == segment_rows(1 << 40) == SEGMENT_STEP
    assert segment_rows(0, 100, 30) == 90


def test_segments_are_all_rows_in_order(tables: Any) -> None:
    model = tables("llama").model
    walk(model, "file")
    source = model.get_output_embeddings().rows
    expected = decode(source.weight)
    found, at = [], 0
    for first, part in source.segments():
        assert first == at
        at += part.out_features
        found.append(decode(part))
    assert torch.equal(torch.cat(found), expected)
    ids = torch.tensor([[3, 3], [0, at - 1]])
    assert torch.equal(decode(source.gather(ids)), expected[ids.flatten()])


def test_a_damaged_table_is_found_on_first_use(tmp_path: Path) -> None:
    damaged = tiny_store("llama", tmp_path)
    content = bytearray((damaged / SHARED).read_bytes())
    content[-5] ^= 4
    (damaged / SHARED).write_bytes(content)
    with pytest.raises(ValueError, match="shared.* is damaged"):
        mebp.load(damaged, weights="file")(**batch())


def test_little_of_a_large_table_is_resident(tmp_path: Path) -> None:
    store = Store(one_matrix(tmp_path, 40_000, 512))
    source = StoredRows(store, "m", CPU, None, Waiting(), None, segment_bytes=1 << 20)
    packed, scales = source.weight.packed.nbytes, source.weight.scales.nbytes
    assert packed > 10_000_000
    store.files[BLOCK].verify()
    most, before = 0, resident().file_backed
    for _, part in source.segments():
        part.packed.sum(), part.scales.sum()
        most = max(most, resident().file_backed - before)
    assert most < scales + packed / 2
    assert resident().file_backed - before < 1 << 20
