"""Packed rows: every row once, no document sees another, and the gradients are those of the rows apart."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ARCHITECTURES, our_gradients, peft_gradients, peft_model, randomize_adapter, tiny_store
from torch import nn

import mebp_triton as mebp
from mebp_triton.data.batching import collate, valid_tokens
from mebp_triton.data.packing import best_fit_decreasing, check_packing, pack
from mebp_triton.data.tokenized import DataReport, TokenizedData

LENGTHS = [9, 24, 5, 2, 13, 11, 7, 17, 3]
REFUSED = {"opt"}  # its mask is made without position_ids


def data_of(lengths, seed=0, prompts=True):
    """Random rows; the first third of each is masked."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, 97, sum(lengths)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    trained = np.ones(len(ids), bool)
    for start, length in zip(offsets, lengths, strict=False):
        trained[start : start + length // 3] = not prompts
    return TokenizedData(ids, trained, offsets, DataReport(len(lengths), len(ids), 0, 0, 0))


# --- which rows go together -----------------------------------------------------------------------------------------


def naive(lengths, capacity):
    """Best-fit decreasing, by looking at every packed row for every one to place."""
    packed = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [row for row in packed if sum(lengths[i] for i in row) + lengths[index] <= capacity]
        if fitting:
            max(fitting, key=lambda row: sum(lengths[i] for i in row)).append(index)
        else:
            packed.append([index])
    return packed


@given(st.lists(st.integers(2, 30), min_size=1, max_size=60))
def test_best_fit_decreasing(lengths):
    members, bounds = best_fit_decreasing(np.array(lengths), 30)
    packed = [members[start:stop].tolist() for start, stop in zip(bounds, bounds[1:], strict=False)]
    assert sorted(members.tolist()) == list(range(len(lengths))) and all(packed)
    filled = [sum(lengths[index] for index in row) for row in packed]
    assert max(filled) <= 30
    # Among packed rows with the same room either may be taken: how full they get is the same.
    assert sorted(filled) == sorted(sum(lengths[index] for index in row) for row in naive(lengths, 30))


def test_a_packed_row_is_its_documents_one_after_the_other():
    data = data_of(LENGTHS)
    packed = pack(data, 24)
    assert len(packed) == 4 < len(data)
    seen = []
    for place in range(len(packed)):
        example = packed[place]
        members = packed.members[packed.bounds[place] : packed.bounds[place + 1]].tolist()
        documents = [data[index] for index in members]
        assert example.input_ids.tolist() == sum((d.input_ids.tolist() for d in documents), [])
        assert example.labels.tolist() == sum(([-100, *d.labels.tolist()[1:]] for d in documents), [])
        assert example.position_ids.tolist() == sum((list(range(len(d.input_ids))) for d in documents), [])
        seen += members
    assert sorted(seen) == list(range(len(data)))
    total = sum(valid_tokens(collate([packed[place]], 0)) for place in range(len(packed)))
    assert total == sum(valid_tokens(collate([data[index]], 0)) for index in range(len(data)))
    with pytest.raises(IndexError):
        packed[len(packed)]
    with pytest.raises(ValueError, match="packing into rows of 23 tokens, but a row has 24"):
        pack(data, 23)


def test_the_report_and_the_checksum_know_of_it():
    data = data_of(LENGTHS)
    packed = pack(data, 24)
    assert packed.report.describe().endswith("packed into 4 rows of 24, 94.8% filled")
    assert packed.checksum() == pack(data_of(LENGTHS), 24).checksum()
    assert len({data.checksum(), packed.checksum(), pack(data, 60).checksum()}) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_a_document_of_its_own(side):
    packed = pack(data_of([5, 4, 6]), 10)
    batch = collate([packed[0], packed[1]], 0, side)
    assert batch.keys() == {"input_ids", "position_ids", "labels"}
    assert [row.tolist() for row in batch["position_ids"]] == {
        "right": [[*range(6), *range(4)], [*range(5), *range(5)]],
        "left": [[*range(6), *range(4)], [*range(5), *range(5)]],
    }[side]
    pads = slice(5, None) if side == "right" else slice(0, 5)
    assert batch["labels"][1, pads].tolist() == [-100] * 5
    assert valid_tokens(batch) == sum(valid_tokens(collate([packed[place]], 0)) for place in (0, 1))


# --- gradients ------------------------------------------------------------------------------------------------------


def load(architecture, store, **options):
    lora = mebp.LoraConfig(r=3, lora_alpha=6)
    model = mebp.load(store, lora, dtype=torch.float64, adapter_dtype=torch.float64, **options)
    randomize_adapter(model)
    return model


def gradients(model, batches, tokens):
    """Loss and our LoRA gradients of a step over these micro-batches, weighted by tokens."""
    model.mebp.loss.normalizer = tokens
    losses = []
    for batch in batches:
        losses.append(model(**batch, use_cache=False).loss)
        losses[-1].backward()
    model.mebp.loss.normalizer = None
    return sum(loss.item() for loss in losses), our_gradients(model)


def true_gradients(store, model, batches, tokens):
    """Those of transformers and PEFT."""
    wrapped = peft_model(store, model, torch.float64, r=3, lora_alpha=6)
    total = 0.0
    for batch in batches:
        logits, labels = wrapped(**batch, use_cache=False).logits, batch["labels"]  # its own loss is in float32
        losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        loss = losses / tokens
        loss.backward()
        total += loss.item()
    return total, peft_gradients(wrapped)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    found = {}

    def store(architecture):
        if architecture not in found:
            found[architecture] = tiny_store(architecture, tmp_path_factory.mktemp(architecture))
        return found[architecture]

    return store


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in REFUSED])
def test_gradients_are_those_of_the_rows_apart(stores, architecture):
    model = load(architecture, stores(architecture), recompute_granularity="selective")
    check_packing(model)
    data, packed = data_of(LENGTHS), pack(data_of(LENGTHS), 40)
    assert len(packed) == 3
    apart = [collate([data[index]], 0) for index in range(len(data))]
    tokens = sum(valid_tokens(batch) for batch in apart)
    together = [collate([packed[0], packed[1]], 0), collate([packed[2]], 0)]
    assert sum(valid_tokens(batch) for batch in together) == tokens
    loss, found = gradients(model, together, tokens)
    true_loss, truth = true_gradients(stores(architecture), model, apart, tokens)
    assert loss == pytest.approx(true_loss, rel=1e-10)
    for name, grad in truth.items():
        assert grad.norm() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_a_model_whose_documents_would_leak_is_refused(stores, architecture):
    model = load(architecture, stores(architecture))
    model.train()
    with pytest.raises(
        ValueError, match=f"packing needs .*train models of type {architecture} without packing"
    ) as error:
        check_packing(model)
    assert "\n" not in str(error.value) and model.training
    assert all(grad is None for grad in our_gradients(model).values())


def test_a_mask_would_let_documents_leak_and_the_check_sees_that(stores, monkeypatch):
    """The planted fault: an attention mask of ones beside the positions."""
    model = load("llama", stores("llama"))
    inner = model.model.forward

    def with_mask(*args, **kwargs):
        ids = kwargs["input_ids"]
        return inner(*args, **kwargs | {"attention_mask": torch.ones_like(ids)})

    monkeypatch.setattr(model.model, "forward", with_mask)
    with pytest.raises(ValueError, match="LlamaForCausalLM looks beyond"):
        check_packing(model)


def test_a_model_without_position_ids_is_refused(stores, monkeypatch):
    model = load("llama", stores("llama"))
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, labels: None)
    with pytest.raises(ValueError, match="packing needs a model that takes position_ids"):
        check_packing(model)
