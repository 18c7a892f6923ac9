"""Embedding and head by their rows: the same numbers as with the whole table in place, and little of it resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import batch, our_gradients, randomize_adapter, tiny_store

import mebp_triton as mebp
from mebp_triton.kernels.reference import decode
from mebp_triton.store import table_rows
from mebp_triton.store.arena import Stager
from mebp_triton.store.manifest import SHARED
from mebp_triton.store.placement import host_copy
from mebp_triton.store.table_rows import StoredRows
from mebp_triton.store.waiting import Waiting
from mebp_triton.system.memory import resident

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_rows, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(table_rows, "SEGMENT_STEP", 20)


def loaded(architecture: str, **options: Any) -> Any:
    model = mebp.load(tiny_store(architecture), mebp.LoraConfig(r=4, lora_alpha=8), **options)
    randomize_adapter(model)
    return model


def walk(model: Any, how: str) -> None:
    """Lets the tables' rows come as ``how`` says: as on a CPU, or as to a device, from the file or the host."""
    waiting, store = Waiting(), model.mebp.store
    stager = None if how == "cpu" else Stager(CPU, waiting, 0)
    host = host_copy(store.files[SHARED], CPU) if how == "host" else None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if module in (embedding, head)}
    for name, module in names.items():
        if name in store.matrices:
            module.rows = StoredRows(store, name, CPU, stager, waiting, host)
    if store.tied_head:
        head.rows = embedding.rows


@pytest.mark.parametrize("how", ["cpu", "file", "host"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "granite", "phi", "gpt2"])
def test_loss_gradients_and_logits_are_those_of_the_whole_table(architecture: str, how: str) -> None:
    """Tied and untied heads, soft-capping, scaled logits, a bias."""
    whole, walked = loaded(architecture), loaded(architecture)
    walk(walked, how)
    assert len(walked.get_output_embeddings().rows.spans) > 3
    examples = batch()
    for model in (whole, walked):
        model(**examples).loss.backward()
    torch.testing.assert_close(walked(**examples).loss, whole(**examples).loss, rtol=1e-6, atol=0)
    for name, gradient in our_gradients(whole).items():
        torch.testing.assert_close(our_gradients(walked)[name], gradient, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        logits = [model(input_ids=examples["input_ids"]).logits for model in (whole, walked)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)


def test_gradients_through_real_logits() -> None:
    whole, walked = loaded("llama"), loaded("llama")
    walk(walked, "cpu")
    examples = batch()
    for model in (whole, walked):
        model(input_ids=examples["input_ids"]).logits.square().mean().backward()
    for name, gradient in our_gradients(whole).items():
        torch.testing.assert_close(our_gradients(walked)[name], gradient, rtol=1e-4, atol=1e-8)


def test_segments_are_all_rows_in_order() -> None:
    model = loaded("llama")
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


def test_little_of_a_large_table_is_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_rows, "SEGMENT_BYTES", 1 << 20)
    monkeypatch.setattr(table_rows, "SEGMENT_STEP", 1024)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=40_000,
        tie_word_embeddings=True,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    mebp.quantize(str(tmp_path / "model"), tmp_path / "store", scale_search=False)
    model = mebp.load(tmp_path / "store", weights="file")
    source = model.get_output_embeddings().rows
    packed, scales = source.weight.packed.nbytes, source.weight.scales.nbytes
    assert packed > 10_000_000
    most, before = 0, resident().file_backed
    for _, part in source.segments():
        part.packed.sum(), part.scales.sum()
        most = max(most, resident().file_backed - before)
    assert most < scales + packed / 2
    assert resident().file_backed - before < 1 << 20
