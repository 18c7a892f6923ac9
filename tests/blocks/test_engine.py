"""The block engine: what runs, what is recomputed, what the gradient is where a block is not trained."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from models import batch, our_gradients, randomize_adapter, relative_rms, tiny_store
from torch import Tensor, nn
from transformers import DynamicCache

import mebp_triton as mebp
from mebp_triton.blocks.engine import BlockEngine
from mebp_triton.store.block_inputs import FileBlockInputs
from mebp_triton.store.pages import Pages


class Block(nn.Module):
    """A residual block whose last layer is followed by additions only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None, flag: str = "") -> tuple[Tensor, str]:
        out = hidden_states + self.down(torch.tanh(self.up(hidden_states)))
        return (out if scale is None else out * scale), flag


class Stack(nn.Module):
    def __init__(self, count: int = 4, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(count)).double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, flag = block(hidden_states=x, flag="kept")
            assert flag == "kept"
        return x.square().sum()


def grads(stack: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in stack.parameters()]


def stacks() -> tuple[Stack, Stack, BlockEngine, Tensor]:
    plain = Stack()
    ours = copy.deepcopy(plain)
    return plain, ours, BlockEngine(ours.blocks), torch.randn(3, 6, dtype=torch.float64)


def test_full_equals_plain_autograd() -> None:
    plain, ours, engine, x = stacks()
    a, b = plain(x), ours(x)
    a.backward()
    b.backward()
    assert torch.equal(a, b)
    assert all(torch.equal(left, right) for left, right in zip(grads(plain), grads(ours), strict=True))
    assert (engine.counters.forward, engine.counters.recompute, engine.counters.identity) == (4, 4, 0)


def test_exact_equals_autograd_with_the_others_frozen() -> None:
    plain, ours, engine, x = stacks()
    engine.treatment = lambda index: "train" if index in (1, 3) else "exact"
    for index in (0, 2):
        plain.blocks[index].requires_grad_(False)
    plain(x).backward()
    ours(x).backward()
    for left, right in zip(grads(plain), grads(ours), strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)
    # Block 0 lies below the lowest selected block: no backward. Block 2 passes the gradient on by its recompute.
    assert (engine.counters.forward, engine.counters.recompute) == (4, 3)
    assert all(p.requires_grad for p in ours.parameters())


def test_identity_equals_a_detached_residual() -> None:
    plain, ours, engine, x = stacks()
    engine.treatment = lambda index: "train" if index in (0, 2) else "identity"
    value = ours(x)
    value.backward()
    hidden = x
    for index, block in enumerate(plain.blocks):
        out, _ = block(hidden)
        hidden = out if index in (0, 2) else hidden + (out - hidden).detach()
    hidden.square().sum().backward()
    for left, right in zip(grads(plain), grads(ours), strict=True):
        assert (left is None) == (right is None)
        assert left is None or relative_rms(right, left) < 1e-12
    assert torch.equal(value, Stack()(x)), "the forward pass of identity is exact"
    assert (engine.counters.recompute, engine.counters.identity) == (2, 2)


def test_a_block_that_changes_its_mode_before_the_backward_pass_is_an_error() -> None:
    """Its dropout would be another one."""
    _, ours, _, x = stacks()
    value = ours(x)
    ours.eval()
    with pytest.raises(RuntimeError, match=r"went from train\(\) to eval\(\)"):
        value.backward()


def test_nothing_below_the_lowest_selected_block_runs_backward() -> None:
    _, ours, engine, x = stacks()
    engine.treatment = lambda index: "train" if index == 3 else "exact"
    ours(x).backward()
    assert (engine.counters.forward, engine.counters.recompute, engine.counters.identity) == (4, 1, 0)


def test_no_grad_and_frozen_blocks_have_no_graph() -> None:
    _, ours, engine, x = stacks()
    with torch.no_grad():
        assert not ours(x).requires_grad
    ours.requires_grad_(False)
    assert not ours(x).requires_grad
    assert engine.counters.recompute == 0


def test_gradients_accumulate_and_autograd_grad_works() -> None:
    plain, ours, _, x = stacks()
    for one in (plain, ours):
        one.blocks[0].up.weight.grad = torch.ones_like(one.blocks[0].up.weight)
        one(x).backward()
        one(2 * x).backward()
    assert all(torch.equal(left, right) for left, right in zip(grads(plain), grads(ours), strict=True))
    weight = "blocks.1.down.weight"
    found = [torch.autograd.grad(one(x), dict(one.named_parameters())[weight])[0] for one in (plain, ours)]
    assert torch.equal(*found)


def test_retained_graph_runs_backward_twice() -> None:
    plain, ours, _, x = stacks()
    for one in (plain, ours):
        loss = one(x)
        loss.backward(retain_graph=True)
        loss.backward()
    assert all(torch.equal(left, right) for left, right in zip(grads(plain), grads(ours), strict=True))


def test_gradient_reaches_inputs_beside_the_hidden_state() -> None:
    block, twin = Block(6).double(), Block(6).double()
    twin.load_state_dict(block.state_dict())
    BlockEngine([block])
    found = []
    for one in (block, twin):
        x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
        scale = torch.full((6,), 2.0, dtype=torch.float64, requires_grad=True)
        one(x, scale)[0].square().sum().backward()
        found.append((x.grad, scale.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_selection_changed_between_forward_and_backward_does_not_matter() -> None:
    plain, ours, engine, x = stacks()
    loss = ours(x)
    engine.treatment = lambda index: "identity"
    loss.backward()
    plain(x).backward()
    assert all(torch.equal(left, right) for left, right in zip(grads(plain), grads(ours), strict=True))


def test_changed_inputs_and_parameters_are_errors() -> None:
    _, ours, _, x = stacks()
    loss = ours(x)
    with torch.no_grad():
        ours.blocks[2].up.weight.add_(1)
    with pytest.raises(RuntimeError, match="block 2 changed"):
        loss.backward()
    _, ours, _, x = stacks()
    loss = ours(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_remove_gives_the_blocks_back() -> None:
    _, ours, engine, x = stacks()
    engine.remove()
    ours(x).backward()
    assert engine.counters.forward == 0 and "forward" not in ours.blocks[0].__dict__


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_store("llama")


def loaded(store: Any, **options: Any) -> Any:
    model = mebp.load(store, mebp.LoraConfig(r=4, lora_alpha=8), **options)
    randomize_adapter(model)
    return model


def test_a_filled_cache_is_refused_and_an_empty_one_ignored(llama: Any) -> None:
    model, examples = loaded(llama), batch(1, 8, None)
    model(**examples, use_cache=True).loss.backward()
    with_cache = our_gradients(model)
    model.zero_grad()
    model(**examples, use_cache=False).loss.backward()
    assert all(torch.equal(with_cache[name], found) for name, found in our_gradients(model).items())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=examples["input_ids"], past_key_values=cache)
    with pytest.raises(ValueError, match="filled cache"):
        model(input_ids=examples["input_ids"], past_key_values=cache)


def test_autocast_on_in_forward_and_off_in_backward(llama: Any) -> None:
    model, examples = loaded(llama), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**examples).loss
    loss.backward()
    inner = our_gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**examples).loss.backward()
    assert all(torch.equal(inner[name], found) for name, found in our_gradients(model).items())


@pytest.mark.parametrize(
    ("architecture", "train", "left_out"),
    [("llama", True, True), ("gpt2", False, True), ("gpt2", True, False), ("gemma3_text", True, False)],
)
def test_the_last_product_is_left_out_only_where_no_gradient_needs_it(
    architecture: str, train: bool, left_out: bool
) -> None:
    """gpt2 has a dropout after its last layer while training, Gemma always a norm."""
    model = loaded(tiny_store(architecture)).train(train)
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        model.zero_grad()
        model(**batch()).loss.backward()
        found.append(our_gradients(model))
    assert [one.last is not None for one in model.mebp.engine.recomputes] == [left_out] * 3
    for later in found[1:]:
        assert all(torch.equal(found[0][name], later[name]) for name in later)


def test_an_engine_alone_and_a_second_checkpointing_change_nothing(llama: Any) -> None:
    model = loaded(llama)
    model(**batch()).loss.backward()
    expected = our_gradients(model)
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = model.mebp.engine.counters.recompute
    model(**batch()).loss.backward()
    assert model.mebp.engine.counters.recompute == before + 3
    assert all(torch.equal(expected[name], found) for name, found in our_gradients(model).items())


def test_a_parameter_changed_in_a_block_that_passes_the_gradient_on_is_an_error() -> None:
    _, ours, engine, x = stacks()
    engine.treatment = lambda index: "train" if index == 0 else "exact"
    loss = ours(x)
    with torch.no_grad():
        ours.blocks[2].up.weight.add_(1)
    with pytest.raises(RuntimeError, match="block 2 changed"):
        loss.backward()


def test_identity_does_not_read_the_blocks_it_passes() -> None:
    """Neither its weights nor its input: both may have changed, and nothing is kept."""
    plain, ours, engine, x = stacks()
    engine.treatment = lambda index: "train" if index == 0 else "identity"
    loss = ours(x)
    with torch.no_grad():
        for block in ours.blocks[1:]:
            for parameter in block.parameters():
                parameter.fill_(float("nan"))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.blocks[0].parameters())
    first, _ = plain.blocks[0](x)
    out = first
    for block in plain.blocks[1:]:
        out, _ = block(out)
    first.backward(2 * out.detach())
    for left, right in zip(plain.blocks[0].parameters(), ours.blocks[0].parameters(), strict=True):
        assert relative_rms(right.grad, left.grad) < 1e-12


def test_blocks_run_backward_in_reverse_within_their_pages() -> None:
    events: list[Any] = []

    class Noted(Pages):
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            events.append(("in", self.index))

        def __exit__(self, *_: object) -> None:
            events.append(("out", self.index))

        def prefetch(self) -> None:
            events.append(("ahead", self.index))

    stack = Stack(3)
    engine = BlockEngine(stack.blocks, [Noted(index) for index in range(3)])
    engine.observer = lambda event, index: events.append((event, index))
    stack(torch.ones(2, 6, dtype=torch.float64)).backward()
    forward = [(what, index) for index in (0, 1, 2) for what in ("in", "out", "forward")]
    backward = [(what, index) for index in (2, 1, 0) for what in ("in", "out", "backward")]
    assert [event for event in events if event[0] != "ahead"] == forward + backward
    # Within a block, the next one is announced: in the end the first one, of the next step.
    announced = [(events[place - 1], index) for place, (what, index) in enumerate(events) if what == "ahead"]
    assert announced == [(("in", at), index) for at, index in ((0, 1), (1, 2), (2, 1), (1, 0), (0, 0))]


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_pages_are_left_when_a_block_fails(when: str) -> None:
    depth = []

    class Counted(Pages):
        def __enter__(self) -> None:
            depth.append(1)

        def __exit__(self, *_: object) -> None:
            depth.pop()

    stack = Stack(2)
    BlockEngine(stack.blocks, [Counted(), Counted()])
    loss = stack(torch.ones(2, 6, dtype=torch.float64)) if when == "backward" else None

    def fail(*_: Any) -> None:
        raise ArithmeticError("planted")

    stack.blocks[1].down.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="planted"):
        stack(torch.ones(2, 6, dtype=torch.float64)) if loss is None else loss.backward()
    assert depth == []


def test_a_block_without_its_hidden_state() -> None:
    _, ours, _, _ = stacks()
    x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    for args, kwargs in (((), {"x": x}), ((None, x), {})):
        with pytest.raises(ValueError, match="without its hidden state"):
            ours.blocks[0](*args, **kwargs)


def test_outputs_that_have_no_gradient_and_arguments_used_twice() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6).double()

        def forward(self, hidden: Tensor, residual: Tensor, mask: Tensor) -> dict[str, Any]:
            out = self.linear(hidden) + residual
            return {"out": [out, out.abs()], "mask": mask | (out > 0), "none": None, "number": 3}

    torch.manual_seed(0)
    plain = Odd()
    ours = copy.deepcopy(plain)
    BlockEngine([ours])
    found = []
    for one in (plain, ours):
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6).requires_grad_(True)
        result = one(x, x, torch.zeros(2, 6, dtype=torch.bool))
        assert result["none"] is None and result["number"] == 3 and result["mask"].dtype == torch.bool
        (result["out"][1] * 2).sum().backward()  # the first output is not used
        found.append((x.grad, one.linear.weight.grad, result["mask"]))
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_parameters_frozen_one_by_one_and_hooks_on_parameters() -> None:
    plain, ours, _, x = stacks()
    seen: list[list[float]] = [[], []]
    for one, notes in ((plain, seen[0]), (ours, seen[1])):
        one.blocks[1].up.bias.requires_grad_(False)
        one.blocks[2].up.weight.register_hook(lambda grad, notes=notes: notes.append(float(grad.sum())) or 2 * grad)
        one(x).backward()
    assert seen[0] == seen[1] and len(seen[0]) == 1
    for left, right in zip(grads(plain), grads(ours), strict=True):
        assert (left is None) == (right is None) and (left is None or torch.equal(left, right))


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
    """Neither tensors nor slots of the checkpoint file: they are as many after ten steps as after one."""
    model = loaded(llama, checkpoints=checkpoints, scratch_directory=tmp_path)
    store = model.mebp.engine.block_inputs
    saved: list[Any] = []
    save = store.save

    def note(tensor: Tensor) -> Any:
        checkpoint = save(tensor)
        saved.append(weakref.ref(checkpoint))
        return checkpoint

    store.save = note
    ends = set()
    for _ in range(4):
        model(**batch()).loss.backward()
        assert len(saved) == 3 and all(reference() is None for reference in saved)
        saved.clear()
        ends.add(store.file.end if checkpoints == "file" else 0)
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
    for name, truth in our_gradients(model).items():
        assert torch.equal(found[0][name], truth) and relative_rms(found[1][name], truth) < 1e-6


@pytest.mark.parametrize("mode", ["identity", "exact", "freeze"])
def test_nothing_below_the_lowest_selected_block_runs_again_for_trainers_that_ask_for_input_gradients(
    mode: Any,
) -> None:
    """They make a leaf of the embedding's output, for gradient checkpointing's sake."""
    model = mebp.load(tiny_store("llama"), mebp.LoraConfig(r=4, lora_alpha=8))
    randomize_adapter(model)
    selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode)
    selection.advance()
    selection.advance()
    assert selection.selected == {2}
    model(**batch()).loss.backward()
    truth = our_gradients(model)
    model.zero_grad()
    model.enable_input_require_grads()
    counters = model.mebp.engine.counters
    counters.pop_counts()
    model(**batch()).loss.backward()
    assert counters.pop_counts() == {"forward": 3, "recompute": 1, "identity": 0, "checkpoint": 1}
    for name, gradient in our_gradients(model).items():
        assert gradient is truth[name] is None or torch.equal(gradient, truth[name])


def test_a_frozen_model_fills_its_cache_with_gradients_on_too(llama: Any) -> None:
    model = loaded(llama).requires_grad_(False)
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
            logits = model(inputs_embeds=embeds, use_cache=False).logits
        found.append(torch.autograd.grad(logits.square().sum(), embeds)[0])
    assert torch.equal(*found) and found[0].any()


def test_the_block_that_is_announced_is_the_next_whose_input_is_read() -> None:
    announced: list[int] = []

    class Noted(Pages):
        def __init__(self, index: int) -> None:
            self.index = index

        def prefetch(self) -> None:
            announced.append(self.index)

    stack = Stack(5)
    engine = BlockEngine(stack.blocks, [Noted(index) for index in range(5)])
    engine.treatment = lambda index: "train" if index in (1, 4) else "identity"
    loss = stack(torch.ones(2, 6, dtype=torch.float64))
    announced.clear()
    loss.backward()
    assert announced == [1, 0], "from block 4 to block 1, then the first of the next step"


def test_only_the_checkpoint_holds_a_blocks_input_between_forward_and_backward(tmp_path: Any) -> None:
    held: dict[str, list[Any]] = {"hidden": [], "scale": []}

    class Noting(Block):
        def forward(self, hidden_states: Tensor, scale: Tensor | None = None, flag: str = "") -> tuple[Tensor, str]:
            held["hidden"].append(weakref.ref(hidden_states))
            held["scale"].append(weakref.ref(scale))
            return super().forward(hidden_states, scale, flag)

    blocks = [Noting(6).double() for _ in range(4)]
    engine = BlockEngine(blocks, block_inputs=FileBlockInputs(tmp_path))
    assert not engine.keep_outputs
    treatments = ("train", "exact", "identity", "train")
    engine.treatment = lambda index: treatments[index]
    x = torch.ones(2, 6, dtype=torch.float64)
    for _ in blocks:
        x, _flag = blocks[len(held["scale"])](x, torch.full((6,), 2.0, dtype=torch.float64))
    alive = {name: [reference() is not None for reference in references] for name, references in held.items()}
    assert alive["hidden"] == [False] * 4
    assert alive["scale"] == [True, True, False, True], "a recompute needs it, and identity has none"
    x.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in blocks[0].parameters())


def test_no_gradient_is_computed_for_parameters_that_are_not_trained() -> None:
    needs: list[tuple[bool, ...]] = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx: Any, *dys: Any) -> Any:
            needs.append(ctx.needs_input_grad)
            x, weight = ctx.saved_tensors
            return dys[0] * weight, (dys[0] * x).sum(0)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, hidden: Tensor) -> Tensor:
            return Product.apply(hidden, self.weight)

    blocks = [Scale() for _ in range(3)]
    engine = BlockEngine(blocks)
    engine.treatment = lambda index: "exact" if index == 1 else "train"
    x = torch.ones(2, 6)
    for block in blocks:
        x = block(x)
    x.sum().backward()
    assert needs == [(True, True), (True, False), (False, True)]
    assert [block.weight.grad is None for block in blocks] == [False, True, False]
    assert all(block.weight.requires_grad for block in blocks)


def test_identity_passes_the_gradient_of_the_hidden_state_alone() -> None:
    """Of a block that returns more than that."""

    class Pair(Block):
        def forward(self, hidden_states: Tensor, scale: Tensor | None = None, flag: str = "") -> Any:
            out, _ = super().forward(hidden_states, scale, flag)
            return out, 3 * out

    block = Pair(6).double()
    engine = BlockEngine([block])
    engine.treatment = lambda index: "identity"
    engine.is_below = lambda index, moving: False  # type: ignore[method-assign]
    x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    out, other = block(x)
    dy = torch.randn(2, 6, dtype=torch.float64)
    torch.autograd.backward([out, other], [dy, torch.ones_like(other)])
    assert torch.equal(x.grad, dy)
