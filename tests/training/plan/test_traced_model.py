"""A few blocks stand for all: one of every kind is traced, and what it takes is what real tensors take."""

import dataclasses

import pytest
from plans import SMALL, planner
from transformers import AutoConfig

from mebp_triton.kernels.workspace import workspace
from mebp_triton.store.reader import Store
from mebp_triton.system.errors import CannotTrace
from mebp_triton.training.plan import live_bytes, traced_model
from mebp_triton.training.plan.inventory import Inventory
from mebp_triton.training.plan.traced_model import TracedModel
from mebp_triton.training.run_settings import resolve
from mebp_triton.training.settings import TrainConfig


def traced(store, **changes):
    settings = resolve(TrainConfig(**SMALL | changes))
    return TracedModel(Inventory.of_store(Store(store)), AutoConfig.from_pretrained(store), settings)


def test_as_many_blocks_are_traced_as_have_one_of_every_kind(store, shared_store):
    assert traced(store).depth == 2  # all alike: the second one shows what a block adds
    assert traced(store, target_modules=r"model\.layers\.2\..*_proj").depth == 3
    sliding = shared_store("gemma3_text")
    kinds = AutoConfig.from_pretrained(sliding).layer_types
    assert len(set(kinds)) == 2
    assert traced(sliding).depth == max(kinds.index(kind) for kind in set(kinds)) + 1


def test_a_trace_holds_no_bytes_and_leaves_nothing_changed(store):
    usual = workspace()
    model = traced(store, dtype="float32")
    first = model.run("full", "device", 0)
    base, again = model.live.live, model.run("selective", "device", 8)
    assert model.live.live == base and workspace() is usual
    assert model.run("full", "device", 0) is first and again.outputs[0] > 0 == first.outputs[0]
    tokens, hidden = SMALL["max_length"], model.config.hidden_size
    assert first.block_input == (4 * tokens * hidden,) * 2


def test_micro_batches_that_are_joined_add_their_block_inputs_and_what_is_as_large(store, monkeypatch, plain_torch):
    """What they add is found by a few of them, where there are many: by two and four here."""
    changes = {"dtype": "float32", "max_length": 32}
    one, two, five = (traced(store, **changes).run("selective", "file", 0, joined) for joined in (1, 2, 5))
    assert five.block_input == tuple(5 * size for size in one.block_input)
    assert five.outputs == tuple(5 * size for size in one.outputs)
    for name in ("forward", "loss", "backward"):
        more = (getattr(five, name) - getattr(two, name)) / 3
        assert 0 < more < 12 * one.block_input[0], f"{name}: a micro-batch is in its block alone"
    monkeypatch.setattr(traced_model, "MOST_JOINED", 4)
    found = traced(store, **changes).run("selective", "file", 0, 5)
    assert found.block_input == five.block_input and found.outputs == five.outputs
    for name in ("forward", "loss", "backward"):
        assert getattr(found, name) == pytest.approx(getattr(five, name), rel=0.05)  # buffers grow by the first trace


def test_rows_that_cannot_be_told_apart_are_traced_one_micro_batch_at_a_time(store, monkeypatch):
    model = traced(store)
    monkeypatch.setattr(traced_model, "find_row_places", refuse)
    assert model.run("full", "device", 0, 4) is model.run("full", "device", 0)


def refuse(*_):
    raise ValueError("no rows")


def test_a_model_whose_code_does_not_run_without_data(store, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("no data\nhere")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaModel.forward", failing)
    with pytest.raises(CannotTrace, match="a model of type llama cannot be traced: RuntimeError: no data$"):
        planner(store).predict(resolve(TrainConfig(**SMALL)))


def test_a_device_runs_kernels_for_small_operations(store, monkeypatch):
    """They keep less for the backward pass, and a layer after them does not find more waiting than it did."""
    settings = dataclasses.replace(resolve(TrainConfig(**SMALL)), device="cuda", dtype="bfloat16")
    inventory, config = Inventory.of_store(Store(store)), AutoConfig.from_pretrained(store)
    results = []
    for triton in (True, False):
        monkeypatch.setattr(live_bytes, "has_triton", lambda triton=triton: triton)
        model = TracedModel(inventory, config, settings)
        assert any(hasattr(module, "fused") for module in model.stack.modules()) is triton
        results.append(model.run("full", "device", 0))
    with_kernels, own = results
    assert with_kernels.backward < own.backward and with_kernels.forward <= own.forward
    assert with_kernels.block_input == own.block_input
