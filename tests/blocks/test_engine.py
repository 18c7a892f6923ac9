"""The block engine: what runs within its pages, which blocks have a backward pass, and training without a cache."""

from __future__ import annotations

import warnings
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_plays import Taped, run, same_run, with_graphs
from late_copies import LateStreams
from models import assert_same, batch, loaded, our_gradients, relative_rms, step
from stacks import Block, Stack, twins
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

import mebp_triton as mebp
from mebp_triton.blocks.engine import BlockEngine, watch_training
from mebp_triton.models.adapter import adapter_layers
from mebp_triton.store.block_inputs import HostBlockInputs
from mebp_triton.store.pages import Pages
from mebp_triton.store.waiting import Waiting

X = torch.ones(2, 6, dtype=torch.float64)


@pytest.fixture(scope="module")
def llama(shared_store: Any) -> Any:
    return shared_store("llama")


@pytest.fixture(scope="module")
def shared_model(llama: Any) -> Any:
    return loaded(llama)


@pytest.fixture
def model(shared_model: Any) -> Any:
    """One model for the tests that leave it as it was."""
    shared_model.zero_grad()
    shared_model.mebp.engine.counters.pop_counts()
    return shared_model.eval()


# --- what runs ------------------------------------------------------------------------------------------------------


def test_nothing_below_the_lowest_selected_block_runs_backward() -> None:
    _, ours, engine, x = twins()
    engine.treatment = lambda index: "train" if index == 3 else "exact"
    ours(x).backward()
    assert (engine.counters.forward, engine.counters.recompute, engine.counters.identity) == (4, 1, 0)


def test_no_grad_and_frozen_blocks_have_no_graph() -> None:
    _, ours, engine, x = twins()
    with torch.no_grad():
        assert not ours(x).requires_grad
    ours.requires_grad_(False)
    assert not ours(x).requires_grad
    assert engine.counters.recompute == engine.counters.checkpoint == 0


class Copies(TorchDispatchMode):
    """While active, counts the launches that copy adapters."""

    launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += func is torch.ops.aten._foreach_copy_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep_outputs", [False, True])
def test_adapters_are_copied_once_in_each_pass_of_a_block(model: Any, keep_outputs: bool) -> None:
    """With the gradients that layers give which copy their own, whatever was written since the last pass."""
    engine = model.mebp.engine
    engine.keep_outputs = keep_outputs
    with torch.autocast("cpu", torch.bfloat16):
        step(model)
        for layer in adapter_layers(model).values():
            layer.lora_B.data.mul_(2)
        with Copies() as copies:
            found = step(model)
        assert copies.launches == 2 * len(engine.blocks)
        adapters, engine.adapters = engine.adapters, [nullcontext()] * len(engine.blocks)
        truth = step(model)
        engine.adapters, engine.keep_outputs = adapters, False
    for layer in adapter_layers(model).values():
        layer.lora_B.data.div_(2)
    assert_same(found, truth)


def test_a_block_without_its_hidden_state() -> None:
    _, ours, _, _ = twins()
    x = X.clone().requires_grad_(True)
    for args, kwargs in (((), {"x": x}), ((None, x), {})):
        with pytest.raises(ValueError, match="without its hidden state"):
            ours.blocks[0](*args, **kwargs)


class Noted(Pages):
    """Writes down when a block's weights are brought in, let go, and announced."""

    def __init__(self, events: list[Any], index: int) -> None:
        self.events, self.index = events, index

    def __enter__(self) -> None:
        self.events.append(("in", self.index))

    def __exit__(self, *_: object) -> None:
        self.events.append(("out", self.index))

    def prefetch(self) -> None:
        self.events.append(("ahead", self.index))


def noted(count: int) -> tuple[Stack, BlockEngine, list[Any]]:
    events: list[Any] = []
    stack = Stack(count)
    engine = BlockEngine(stack.blocks, [Noted(events, index) for index in range(count)])
    engine.observer = lambda event, index: events.append((event, index))
    return stack, engine, events


def test_blocks_run_backward_in_reverse_within_their_pages() -> None:
    stack, _, events = noted(3)
    stack(X).backward()
    forward = [(what, index) for index in (0, 1, 2) for what in ("in", "out", "forward")]
    backward = [(what, index) for index in (2, 1, 0) for what in ("in", "out", "backward")]
    assert [event for event in events if event[0] != "ahead"] == forward + backward
    # Within a block, the next one is announced: in the end the first one, of the next step.
    announced = [(events[place - 1], index) for place, (what, index) in enumerate(events) if what == "ahead"]
    assert announced == [(("in", at), index) for at, index in ((0, 1), (1, 2), (2, 1), (1, 0), (0, 0))]


def test_without_gradients_blocks_run_within_their_pages_too() -> None:
    stack, _, events = noted(2)
    with torch.no_grad():
        stack(X)
    assert [event for event in events if event[0] != "ahead"] == [
        (what, index) for index in (0, 1) for what in ("in", "out", "forward")
    ]


def test_the_block_that_is_announced_is_the_next_whose_input_is_read() -> None:
    stack, engine, events = noted(5)
    engine.treatment = lambda index: "train" if index in (1, 4) else "identity"
    loss = stack(X)
    events.clear()
    loss.backward()
    announced = [index for what, index in events if what == "ahead"]
    assert announced == [1, 0], "from block 4 to block 1, then the first of the next step"


def test_where_the_backward_pass_ends_the_next_steps_first_block_is_announced() -> None:
    stack, engine, events = noted(5)
    engine.treatment = lambda index: "train" if index == 3 else "exact"
    loss = stack(X)
    events.clear()
    loss.backward()
    assert [index for what, index in events if what == "ahead"] == [3, 0], "nothing below block 3 is read"


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_pages_are_left_when_a_block_fails(when: str) -> None:
    stack, _, events = noted(2)
    loss = stack(X) if when == "backward" else None

    def fail(*_: Any) -> None:
        raise ArithmeticError("planted")

    stack.blocks[1].down.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="planted"):
        stack(X) if loss is None else loss.backward()
    entered, left = ([index for what, index in events if what == way] for way in ("in", "out"))
    assert sorted(entered) == sorted(left)


def test_time_is_counted_where_it_is_said() -> None:
    waiting = Waiting()
    assert BlockEngine(Stack(1).blocks, waiting=waiting).waiting is waiting
    assert BlockEngine(Stack(1).blocks).waiting == Waiting()


def test_remove_gives_the_blocks_back() -> None:
    _, ours, engine, x = twins()
    engine.remove()
    ours(x).backward()
    assert engine.counters.forward == 0 and "forward" not in ours.blocks[0].__dict__


# --- with transformers' models --------------------------------------------------------------------------------------


def test_autocast_on_in_forward_and_off_in_backward(model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    inner = our_gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch()).loss.backward()
    assert_same(our_gradients(model), inner)


@pytest.mark.parametrize(
    ("architecture", "train", "left_out"),
    [("llama", True, True), ("gpt2", False, True), ("gpt2", True, False), ("gemma3_text", True, False)],
)
def test_the_last_product_is_left_out_only_where_no_gradient_needs_it(
    shared_store: Any, architecture: str, train: bool, left_out: bool
) -> None:
    """gpt2 has a dropout after its last layer while training, Gemma always a norm."""
    model = loaded(shared_store(architecture)).train(train)
    found = [step(model) for _ in range(3)]
    assert [one.last is not None for one in model.mebp.engine.recomputes] == [left_out] * 3
    for later in found[1:]:
        assert_same(later, found[0])


def test_a_second_checkpointing_changes_nothing(model: Any) -> None:
    expected = step(model)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.mebp.engine.counters.pop_counts()
    assert_same(step(model), expected)
    assert model.mebp.engine.counters.recompute == 3


def test_a_leaf_below_the_blocks_gets_its_gradient(llama: Any) -> None:
    found = []
    for keep in (True, False):
        model = loaded(llama)
        if not keep:
            model.mebp.engine.remove()
        embeds = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_(True)
        model(inputs_embeds=embeds, labels=batch()["labels"]).loss.backward()
        found.append(embeds.grad)
    assert relative_rms(*found) < 1e-6


@pytest.mark.parametrize("checkpoints", ["device", "host", "file"])
def test_nothing_stays_behind_after_a_step(llama: Any, checkpoints: Any, tmp_path: Any) -> None:
    """Neither tensors nor slots of the file: they are as many after many steps as after one."""
    model = loaded(llama, checkpoints=checkpoints, scratch_directory=tmp_path)

    class Noting:
        inner, saved = model.mebp.engine.block_inputs, []  # type: ignore[var-annotated]

        def save(self, tensor: Tensor) -> Any:
            made = self.inner.save(tensor)
            self.saved.append(weakref.ref(made))
            return made

    model.mebp.engine.block_inputs = store = Noting()
    ends = set()
    for _ in range(4):
        model(**batch()).loss.backward()
        assert len(store.saved) == 3 and all(reference() is None for reference in store.saved)
        store.saved.clear()
        ends.add(store.inner.file.end if checkpoints == "file" else 0)
    assert len(ends) == 1


def test_micro_batches_in_flight_at_once(llama: Any, tmp_path: Any) -> None:
    """Two forward passes, then their backward passes in either order."""
    model = loaded(llama, checkpoints="file", scratch_directory=tmp_path)
    found = []
    for order in ((0, 1), (1, 0)):
        model.zero_grad()
        losses = [model(**batch(seed=seed)).loss for seed in (1, 2)]
        for place in order:
            losses[place].backward()
        found.append(our_gradients(model))
    model.zero_grad()
    for seed in (1, 2):
        model(**batch(seed=seed)).loss.backward()
    assert_same(found[0], our_gradients(model))
    assert_same(found[1], our_gradients(model), 1e-6)


@pytest.mark.parametrize(
    ("options", "seed"), [({}, None), ({"recompute_granularity": "selective"}, 0), ({"block_rows": 1}, None)]
)
def test_block_inputs_that_come_and_go_beside_the_computation(llama: Any, options: dict[str, Any], seed: Any) -> None:
    plain, ours = loaded(llama, **options), loaded(llama, **options)
    streams = LateStreams(seed)
    ours.mebp.engine.block_inputs = HostBlockInputs(lambda device: streams)
    for number in range(2):
        with streams:
            found = run(ours, **batch(seed=number))
        loss, gradients = run(plain, **batch(seed=number))
        assert torch.equal(found[0], loss)
        assert_same(found[1], gradients)
    if not options:  # each overlaps, but that of the top block's input, which is wanted at once
        assert len(streams.beside) == streams.copies - 2 == 2 * (3 + 2)


def test_graphs_read_block_inputs_that_were_brought(llama: Any) -> None:
    plain, ours = loaded(llama), loaded(llama)
    streams, graphs = LateStreams(), with_graphs(ours, Taped())
    ours.mebp.engine.block_inputs = HostBlockInputs(lambda device: streams)
    for number in range(3):
        with streams:
            found = run(ours, **batch(seed=number))
        loss, gradients = run(plain, **batch(seed=number))
        assert torch.equal(found[0], loss)
        assert_same(found[1], gradients)
    assert graphs.played == 6


@pytest.mark.parametrize("forgotten", ["computing", "copying"])
def test_a_wait_that_is_missing_is_seen(llama: Any, forgotten: str) -> None:
    plain, ours = loaded(llama), loaded(llama)
    streams = LateStreams(forgotten=forgotten)
    ours.mebp.engine.block_inputs = HostBlockInputs(lambda device: streams)
    with streams, pytest.raises(AssertionError):
        same_run(ours, plain)


@pytest.mark.parametrize("mode", ["identity", "exact", "freeze"])
def test_nothing_below_runs_again_for_trainers_that_ask_for_input_gradients(llama: Any, mode: Any) -> None:
    """They make a leaf of the embedding's output, for the sake of gradient checkpointing."""
    model = loaded(llama)
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode)
    selection.advance()
    selection.advance()
    assert selection.selected == {2}
    truth = step(model)
    model.enable_input_require_grads()
    counters = model.mebp.engine.counters
    counters.pop_counts()
    found = step(model)
    assert counters.pop_counts() == {"forward": 3, "recompute": 1, "identity": 0, "checkpoint": 1}
    assert_same(found, truth)


# --- training makes no cache ----------------------------------------------------------------------------------------


def test_a_cache_is_not_made_and_an_empty_one_stays_empty(model: Any) -> None:
    examples, cache = batch(1, 8, None), DynamicCache(config=model.config)
    truth = step(model, **examples)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"past_key_values": cache, "use_cache": False}):
            model.zero_grad()
            output = model(**examples, **options)
            output.loss.backward()
            assert_same(our_gradients(model), truth)
    assert cache.get_seq_length() == 0


def test_asking_for_a_cache_is_warned_of(model: Any) -> None:
    examples = batch(1, 8, None)
    truth = step(model, **examples)
    for options in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        model.zero_grad()
        with pytest.warns(UserWarning, match="the key-value cache stays empty"):
            model(**examples, **options).loss.backward()
        assert_same(our_gradients(model), truth)


def test_a_filled_cache_is_refused(model: Any) -> None:
    ids, cache = batch(1, 8, None)["input_ids"], DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 1
    with pytest.raises(ValueError, match="past_key_values holds tokens: .*filled cache"):
        model(input_ids=ids, past_key_values=cache)


def test_a_frozen_model_fills_its_cache_with_gradients_on_too(llama: Any) -> None:
    model = mebp.load(llama)
    ids = batch(1, 8, None)["input_ids"]
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 8
    embeds = model.get_input_embeddings()(ids).requires_grad_(True)  # prompt tuning: only the input is trained
    found = []
    for cached in (True, False):
        if cached:
            with pytest.warns(UserWarning, match="gradients are on: the key-value cache stays empty"):
                logits = model(inputs_embeds=embeds, use_cache=True).logits
        else:
            cache = DynamicCache(config=model.config)
            logits = model(inputs_embeds=embeds, use_cache=False, past_key_values=cache).logits
            assert cache.get_seq_length() == 0
        found.append(torch.autograd.grad(logits.square().sum(), embeds)[0])
    assert torch.equal(*found) and found[0].any()


@pytest.mark.parametrize("use_cache", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
def test_a_model_without_attention(shared_store: Any, use_cache: dict[str, bool]) -> None:
    """Its cache is of another kind; training makes none."""
    model = loaded(shared_store("lfm2"), {"target_modules": ["in_proj", "w1"]})
    output = model(**batch(), **use_cache)
    output.loss.backward()
    assert output.past_key_values is None
    assert all(grad is not None for grad in our_gradients(model).values())


@pytest.mark.parametrize(
    ("architecture", "flag"), [("granitemoe", "output_router_logits"), ("llama", "output_attentions")]
)
@pytest.mark.filterwarnings("ignore:GraniteMoeForCausalLM does not run on the meta device")
def test_what_a_block_computes_inside_is_not_handed_out_while_training(
    shared_store: Any, architecture: str, flag: str
) -> None:
    """Router logits make an auxiliary loss: it would be in the loss, and not in the gradient."""
    model = loaded(shared_store(architecture), attn_implementation="eager")
    with pytest.raises(ValueError, match=f"{flag}=True: values from inside a block have no gradient"):
        model(**batch(), **{flag: True})
    with torch.no_grad():
        assert model(**batch(), **{flag: True})[flag.removeprefix("output_")] is not None
    setattr(model.config, flag, True)
    with pytest.raises(ValueError, match=flag):
        model.model(batch()["input_ids"])
    model(**batch(), **{flag: False}).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    assert not model(**batch()).loss.requires_grad
    trained[0].requires_grad_(True)
    model.mebp.engine.remove()
    assert model(**batch()).loss.requires_grad, "without the engine, blocks have their graph"


def test_blocks_alone_are_run_as_blocks() -> None:
    block = Block(6).double()
    engine = BlockEngine([block])
    out, flag = block(X.clone().requires_grad_(True), flag="kept")
    out.sum().backward()
    assert flag == "kept" and engine.counters.recompute == 1


class Decoder(PreTrainedModel):
    """A decoder that knows neither a cache nor outputs to record, beside those of its class attribute."""

    config_class = LlamaConfig
    _can_record_outputs = None

    def __init__(self) -> None:
        super().__init__(LlamaConfig(num_hidden_layers=1))
        self.layers = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Any:
        return self.layers[0](x)


class Lenient(Decoder):
    """A decoder that takes any keyword, and says which it was given."""

    _can_record_outputs = {"hidden_states": nn.Linear, "router_scores": nn.Linear}

    def forward(self, x: Tensor, **given: Any) -> Any:
        return given


def watched(kind: type[Decoder]) -> Any:
    model = kind()
    model.config.use_cache = True
    watch_training(model, "layers", SimpleNamespace(removed=False))  # type: ignore[arg-type]
    return model


def test_a_decoder_without_a_cache_is_told_nothing_of_one() -> None:
    model = watched(Decoder)
    assert model(torch.ones(1, 2)).requires_grad
    for name in ("output_attentions", "output_router_logits"):
        with pytest.raises(ValueError, match=f"{name}=True: values from inside a block"):
            model(torch.ones(1, 2), **{name: True})


class ByPlace(Decoder):
    def forward(self, x: Tensor, use_cache: bool = True) -> Any:
        return self.layers[0](x) if use_cache else None


def test_a_cache_that_is_asked_for_by_place_is_switched_off() -> None:
    assert watched(ByPlace)(torch.ones(1, 2), True) is None


def test_a_decoder_that_takes_any_keyword_runs_without_a_cache() -> None:
    model = watched(Lenient)
    assert model(torch.ones(1, 2)) == {"use_cache": False}
    given = model(torch.ones(1, 2), output_hidden_states=True)
    assert given == {"use_cache": False, "output_hidden_states": True}, "these lie between blocks"
    with pytest.raises(ValueError, match="output_router_scores=True: values from inside a block"):
        model(torch.ones(1, 2), output_router_scores=True)


def test_a_compiled_model_computes_the_same(shared_store: Any) -> None:
    """With rows of two lengths, so that the compiler makes its shapes dynamic."""
    rows = [batch(1, length, None, seed=length) for length in (9, 12)]
    store = shared_store("llama", config={"num_hidden_layers": 2})
    model, twin = (loaded(store, weights="file", checkpoints="file").train() for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for row in rows:
            losses = []
            for one, called in ((model, model), (twin, compiled)):
                one.zero_grad()
                loss = called(**row, use_cache=False).loss
                loss.backward()
                losses.append(loss.detach())
            assert torch.equal(*losses)
            assert_same(our_gradients(twin), our_gradients(model))
    torch._dynamo.reset()
    assert len([one for one in caught if "torch.compile leaves the blocks of this model as they are" in str(one)]) == 1


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_compiled_parts_of_blocks_run_as_they_are(llama: Any, granularity: Any) -> None:
    """A compiler does not see that a recompute puts other hooks and tapes on the layers than the forward pass did."""
    model, twin = (loaded(llama, recompute_granularity=granularity).train() for _ in range(2))
    for block in twin.model.layers:
        block.mlp.compile(backend="aot_eager")
        block.self_attn.compile(backend="aot_eager")
    for length in (9, 12):
        assert_same(step(twin, **batch(1, length, None)), step(model, **batch(1, length, None)))
