"""A selection on models of others: against autograd, with and without gradient checkpointing, and off again."""

from __future__ import annotations

import copy
import functools
from typing import Any

import accelerate
import peft
import pytest
import torch
from models import batch, decoded_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint, checkpoint_sequential
from transformers.modeling_layers import GradientCheckpointingLayer

import mebp_triton as mebp
from mebp_triton.blocks.runner import find_blocks

MODES = ["full", "identity", "exact", "freeze"]
CHECKPOINTING = ["none", "reentrant", "non-reentrant"]


@pytest.fixture(scope="module")
def plain(shared_store: Any) -> Any:
    """A PEFT model in float64 with four blocks."""
    store = shared_store("llama", config={"num_hidden_layers": 4})
    torch.manual_seed(3)
    return adapted(decoded_model(store).double(), r=4).train()


def adapted(model: Any, r: int = 2) -> Any:
    config = peft.LoraConfig(r=r, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def copied(model: Any, checkpointing: str = "none") -> Any:
    model = copy.deepcopy(model)
    if checkpointing != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model


def step(model: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss, and the gradient of every trainable parameter."""
    model.zero_grad()
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad or p.grad is not None}


def treated(model: Any, mode: str, selected: frozenset[int]) -> Any:
    """A selection by means of autograd alone: frozen parameters, and residual branches that are detached."""
    model = copied(model)
    blocks = find_blocks(model)[1]
    for index in set(range(len(blocks))) - selected:
        if mode == "identity":
            blocks[index].register_forward_hook(lambda _, args, out: args[0] + (out - args[0]).detach())
        for parameter in blocks[index].parameters():
            parameter.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def truth(plain: Any) -> Any:
    """Loss and gradients of ``plain`` under a selection, computed once for each."""

    @functools.cache
    def compute(mode: str, selected: frozenset[int]) -> Any:
        return step(treated(plain, mode, selected))

    return compute


def same(found: dict[str, Tensor | None], truth: dict[str, Tensor | None], selected: frozenset[int]) -> None:
    for name, gradient in found.items():
        inside = int(name.split(".layers.")[1].split(".")[0]) in selected
        assert (gradient is not None) == inside, name
        if gradient is not None:
            torch.testing.assert_close(gradient, truth[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_autograds_and_the_loss_is_the_same_bits(
    plain: Any, truth: Any, mode: Any, checkpointing: str
) -> None:
    loss = truth("full", frozenset(range(4)))[0]
    model = copied(plain, checkpointing)
    selection = mebp.LayerCyclicManager(model, ratio=0.25, mode=mode)
    for _ in range(5 if mode in ("identity", "exact") else 2):
        found_loss, found = step(model)
        assert torch.equal(found_loss, loss)
        same(found, truth(mode, selection.selected)[1], selection.selected)
        selection.advance()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("mode", ["identity", "exact", "freeze"])
def test_what_is_not_needed_does_not_run(plain: Any, mode: Any, checkpointing: str) -> None:
    """Attention calls of each block, forward and (by checkpointing) in the backward pass."""
    model = copied(plain, checkpointing)
    blocks = find_blocks(model)[1]
    selection = mebp.LayerCyclicManager(model, ratio=0.25, mode=mode)
    selection.advance()
    selection.advance()
    chosen = 3 if mode == "freeze" else 2
    assert selection.selected == {chosen}
    calls = [0] * 4

    def count(index: int, *_: Any) -> None:
        calls[index] += 1

    for index, block in enumerate(blocks):
        block.self_attn.register_forward_hook(functools.partial(count, index))
    selection.engine.counters.pop_counts()
    step(model)
    again = [1 if index == chosen or (mode != "identity" and index > chosen) else 0 for index in range(4)]
    assert calls == ([1] * 4 if checkpointing == "none" else [1 + more for more in again])
    assert selection.engine.counters.pop_counts()["forward"] == 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(width, width), 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        return hidden_states + torch.tanh(self.layer(hidden_states))


class Marked(Block, GradientCheckpointingLayer):
    """As transformers' own before 5: the checkpoint is around the call, and says so."""

    gradient_checkpointing = True
    __call__ = nn.Module.__call__


Marked.forward = Block.forward  # type: ignore[method-assign]  # without what newer versions wrap around it


class Around(nn.Module):
    """Checkpoints lie around the blocks, so that recomputes come through their hooks."""

    def __init__(self, reentrant: bool, kind: type[Block] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind(6) for _ in range(4)).double()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x.square().sum()


@pytest.mark.parametrize("kind", [Block, Marked])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["identity", "exact", "freeze"])
def test_checkpoints_around_the_blocks(mode: Any, reentrant: bool, kind: Any) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    model, other = Around(reentrant, kind), Around(False)
    selection = mebp.LayerCyclicManager(model, ratio=0.25, mode=mode, blocks="blocks")
    for _ in range(4):
        model.zero_grad()
        model(x.clone().requires_grad_(True)).backward()
        other.load_state_dict(model.state_dict())
        hidden = x
        for index, block in enumerate(other.blocks):
            block.requires_grad_(index in selection.selected)
            out = block(hidden)
            passed = mode == "identity" and index not in selection.selected
            hidden = hidden + (out - hidden).detach() if passed else out
        other.zero_grad()
        hidden.square().sum().backward()
        lowest = min(selection.selected)
        for index, (block, truth) in enumerate(zip(model.blocks, other.blocks, strict=True)):
            assert (block.layer.weight.grad is None) == (index not in selection.selected), index
            if index in selection.selected:
                torch.testing.assert_close(block.layer.weight.grad, truth.layer.weight.grad, rtol=1e-12, atol=1e-14)
            again = index in selection.selected or (mode != "identity" and index > lowest)
            # A reentrant checkpoint that somebody else made runs again whatever is in it.
            assert block.calls == 1 + (again or (reentrant and kind is Block)), index
            block.calls = 0
        selection.advance()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["identity", "exact"])
def test_a_checkpoint_around_several_blocks(mode: Any, reentrant: bool) -> None:
    """What a block gives in a recompute is read by the next one there."""
    x = torch.randn(3, 6, dtype=torch.float64)
    found, truth = Around(reentrant), Around(reentrant)
    for model, spans in ((found, 2), (truth, 4)):
        selection = mebp.LayerCyclicManager(model, ratio=0.25, mode=mode, blocks="blocks")
        for _ in range(4):
            start = x.clone().requires_grad_(True)
            checkpoint_sequential(model.blocks, spans, start, use_reentrant=reentrant).square().sum().backward()
            selection.advance()
    for block, other in zip(found.blocks, truth.blocks, strict=True):
        assert block.layer.weight.grad.any()
        torch.testing.assert_close(block.layer.weight.grad, other.layer.weight.grad, rtol=1e-12, atol=1e-14)


def keep(outputs: dict[int, Tensor], index: int, _: Any, args: Any, output: Tensor) -> None:
    outputs[index] = output


def test_nothing_below_the_lowest_selected_block_has_a_graph(plain: Any) -> None:
    for mode in ("identity", "exact", "freeze"):
        model = copied(plain)
        model.enable_input_require_grads()  # as trainers do
        blocks = find_blocks(model)[1]
        selection = mebp.LayerCyclicManager(model, ratio=0.25, mode=mode)  # type: ignore[arg-type]
        for _ in range(2):
            selection.advance()
        outputs: dict[int, Tensor] = {}
        for index, block in enumerate(blocks):
            block.register_forward_hook(functools.partial(keep, outputs, index))
        step(model)
        lowest = min(selection.selected)
        assert lowest >= 2
        assert all(outputs[index].grad_fn is None for index in range(lowest))
        assert all(outputs[index].grad_fn is not None for index in range(lowest, 4))


def test_a_trained_embedding_gets_its_gradient_through_every_block(plain: Any) -> None:
    for mode in ("identity", "exact", "freeze"):
        model = copied(plain)
        selection = mebp.LayerCyclicManager(model, ratio=0.25, mode=mode)  # type: ignore[arg-type]
        selection.advance()
        other = treated(plain, mode, selection.selected)
        for one in (model, other):
            one.get_input_embeddings().weight.requires_grad_(True)
        found, truth = step(model)[1], step(other)[1]
        name = next(name for name in found if "embed_tokens" in name)
        assert found[name] is not None and found[name].any()
        torch.testing.assert_close(found[name], truth[name], rtol=1e-10, atol=1e-13)


def test_off_again_without_a_trace(plain: Any) -> None:
    model = copied(plain)
    before = [dict(block.__dict__) for block in find_blocks(model)[1]]
    truth = step(model)[1]
    selection = mebp.LayerCyclicManager(model, ratio=0.25)
    assert any(gradient is None for gradient in step(model)[1].values())
    selection.remove()
    after = [dict(block.__dict__) for block in find_blocks(model)[1]]
    assert [set(one) for one in before] == [set(one) for one in after]
    found = step(model)[1]
    assert all(torch.equal(gradient, truth[name]) for name, gradient in found.items() if gradient is not None)
    assert all(gradient is not None for gradient in found.values())
    mebp.LayerCyclicManager(model, ratio=0.25).remove()


def test_off_again_where_others_wrapped_it_since(plain: Any) -> None:
    """As accelerate's hooks do."""
    model = copied(plain)
    truth = step(model)[1]
    selection = mebp.LayerCyclicManager(model, ratio=0.25)
    block, calls = find_blocks(model)[1][0], []
    inner = block.forward
    block.forward = functools.wraps(inner)(lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs))
    selection.remove()
    found = step(model)[1]
    assert calls and all(torch.equal(found[name], gradient) for name, gradient in truth.items())
    mebp.LayerCyclicManager(model, ratio=0.25)


def test_two_managers_on_one_model_are_refused(plain: Any) -> None:
    model = copied(plain)
    mebp.LayerCyclicManager(model)
    with pytest.raises(ValueError, match="have an engine already"):
        mebp.LayerCyclicManager(model)


def compare_compiled(truth_model: Any, model: Any, steps: int, run: Any, **options: Any) -> None:
    """Dynamo traces inside the blocks; the choice between treatments stays outside of what it compiles."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    selections = [mebp.LayerCyclicManager(one, ratio=0.5, **options) for one in (truth_model, model)]
    for _ in range(steps):
        losses = []
        for one, called in ((truth_model, truth_model), (model, compiled)):
            one.zero_grad()
            losses.append(run(called))
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        for (name, mine), theirs in zip(model.named_parameters(), truth_model.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            assert mine.grad is None or torch.allclose(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
        for selection in selections:
            selection.advance()
    assert len(graphs) > 1
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["identity", "exact"])
def test_a_compiled_model(mode: Any) -> None:
    class Plain(Around):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x.square().sum()

    x = torch.randn(3, 6, dtype=torch.float64)
    compare_compiled(Plain(False), Plain(False), 3, lambda model: model(x), mode=mode, blocks="blocks")


def test_a_compiled_model_of_transformers(shared_store: Any) -> None:
    model = decoded_model(shared_store("llama", config={"num_hidden_layers": 2})).double().train()
    compare_compiled(
        copy.deepcopy(model), model, 2, lambda model: model(**batch(), use_cache=False).loss, mode="identity"
    )


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text"])
def test_nothing_below_runs_where_the_embedding_is_not_the_blocks_input(
    shared_store: Any, architecture: str, checkpointing: str
) -> None:
    """GPT-2 adds positions: the first block's input is no leaf once inputs require gradients."""
    model = copied(adapted(decoded_model(shared_store(architecture))).train(), checkpointing)
    blocks = find_blocks(model)[1]
    selection = mebp.LayerCyclicManager(model, ratio=1 / len(blocks), mode="exact")
    while selection.selected != {len(blocks) - 1}:
        selection.advance()
    calls = [0] * len(blocks)

    def count(index: int, *_: Any) -> None:
        calls[index] += 1

    for index, block in enumerate(blocks):
        (block.attn if architecture == "gpt2" else block.self_attn).register_forward_hook(
            functools.partial(count, index)
        )
    step(model)
    assert calls == [1] * (len(blocks) - 1) + [1 + (checkpointing != "none")]


class Crossed(nn.Module):
    """Blocks that also read what another, trained module gave: an encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(6, 6).double()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)).double()
        for block in self.blocks:
            block.forward = functools.partial(self.block, block, block.forward)

    @staticmethod
    def block(block: nn.Module, linear: Any, hidden: Tensor, encoded: Tensor) -> Tensor:
        return hidden + torch.tanh(linear(hidden) * encoded)

    def forward(self, x: Tensor) -> Tensor:
        encoded, hidden = self.encoder(x), x
        for block in self.blocks:
            hidden = block(hidden, encoded)
        return hidden.square().sum()


def test_a_gradient_that_leaves_by_another_input_is_kept() -> None:
    x = torch.randn(2, 6, dtype=torch.float64)
    for chosen in range(3):
        model, other = Crossed(), Crossed()
        selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode="exact", blocks="blocks")
        for _ in range(chosen):
            selection.advance()
        model(x).backward()
        for index, block in enumerate(other.blocks):
            block.requires_grad_(index == chosen)
        other(x).backward()
        torch.testing.assert_close(model.encoder.weight.grad, other.encoder.weight.grad, rtol=1e-12, atol=1e-14)


def test_a_skipped_first_block_changes_nothing_for_the_others() -> None:
    """As LayerDrop skips."""
    model = Around(False)
    selection = mebp.LayerCyclicManager(model, ratio=0.25, mode="exact", blocks="blocks")
    selection.advance()
    hidden = torch.randn(3, 6, dtype=torch.float64)
    for block in model.blocks[1:]:
        hidden = block(hidden)
    hidden.sum().backward()
    assert [block.layer.weight.grad is not None for block in model.blocks] == [False, True, False, False]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("mode", ["identity", "exact"])
def test_a_selection_that_changes_before_the_backward_pass_is_an_error(
    plain: Any, mode: Any, checkpointing: str
) -> None:
    model = copied(plain, checkpointing)
    selection = mebp.LayerCyclicManager(model, ratio=0.5, mode=mode)
    loss = model(**batch(), use_cache=False).loss
    selection.advance()
    with pytest.raises((RuntimeError, CheckpointError), match=r"advance\(\) after|different number|different metadata"):
        loss.backward()
    for around in (True, False):
        other = Around(around)
        selection = mebp.LayerCyclicManager(other, ratio=0.5, mode=mode, blocks="blocks")
        loss = other(torch.randn(3, 6, dtype=torch.float64, requires_grad=True))
        selection.advance()
        with pytest.raises((RuntimeError, CheckpointError)):
            loss.backward()


def test_an_evaluation_between_forward_and_backward_changes_nothing(plain: Any) -> None:
    for checkpointing in CHECKPOINTING:
        model = copied(plain, checkpointing)
        model.get_input_embeddings().weight.requires_grad_(True)
        selection = mebp.LayerCyclicManager(model, ratio=0.25, mode="exact")
        selection.advance()
        truth = {name: None if g is None else g.clone() for name, g in step(model)[1].items()}
        model.zero_grad()
        loss = model(**batch(), use_cache=False).loss
        with torch.no_grad():
            model(**batch(), use_cache=False)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (truth.get(name) is None), name
            assert parameter.grad is None or torch.equal(parameter.grad, truth[name]), name


def test_a_forward_pass_without_the_adapter_does_not_thaw_what_the_next_one_freezes(plain: Any) -> None:
    model = copied(plain)
    selection = mebp.LayerCyclicManager(model, ratio=0.25, mode="exact")
    with model.disable_adapter():
        model(**batch(), use_cache=False)
    trained = {int(n.split(".layers.")[1].split(".")[0]) for n, g in step(model)[1].items() if g is not None}
    assert trained == selection.selected == {0}


def test_blocks_that_have_nothing_to_train_are_refused(shared_store: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0], task_type="CAUSAL_LM")
    model = peft.get_peft_model(decoded_model(shared_store("llama")), config)
    for _ in range(2):  # and nothing stays behind
        with pytest.raises(ValueError, match="block 1 has no trainable parameters and may be selected"):
            mebp.LayerCyclicManager(model, ratio=0.5)
    mebp.LayerCyclicManager(model, mode="full").remove()


# --- with an optimizer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["momentum", "none"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_attached_optimizer_advances_and_updates_as_said(plain: Any, update: Any, set_to_none: bool) -> None:
    ours, theirs = copied(plain), copied(plain)
    selection = mebp.LayerCyclicManager(ours, ratio=0.25, mode="exact")
    mirror = mebp.LayerCyclicManager(theirs, ratio=0.25, mode="exact")
    parameters = [[p for p in model.parameters() if p.requires_grad] for model in (ours, theirs)]
    optimizers = [torch.optim.AdamW(group, lr=1e-2, weight_decay=0.1) for group in parameters]
    selection.attach(optimizers[0], update)
    for number in range(6):
        assert selection.step == number
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(**batch(), use_cache=False).loss.backward()
            if model is theirs:
                for index in set(range(4)) - mirror.selected:
                    for parameter in mirror.engine.trainable(index):
                        parameter.grad = torch.zeros_like(parameter) if update == "momentum" else None
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        mirror.advance()
        assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
    selection.detach()
    optimizers[0].step()
    assert selection.step == 6
    with pytest.raises(ValueError, match="unselected update must be one of momentum, none, got 'zero'"):
        selection.attach(optimizers[0], "zero")  # type: ignore[arg-type]


def test_attaching_again_replaces(plain: Any) -> None:
    model = copied(plain)
    selection = mebp.LayerCyclicManager(model, ratio=0.25, mode="exact")
    optimizers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad]) for _ in range(2)]
    for optimizer in optimizers:
        selection.attach(optimizer)
        selection.attach(optimizer)
    optimizers[1].step()
    assert selection.step == 1
    optimizers[0].step()
    assert selection.step == 1
    selection.remove()
    optimizers[1].step()
    assert selection.step == 1


def test_accelerates_optimizer(plain: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = copied(plain)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    selection = mebp.LayerCyclicManager(model, ratio=0.25, mode="exact")
    selection.attach(optimizer)
    for number in range(3):
        assert selection.step == number
        accelerator.backward(model(**batch(), use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimizer_that_lacks_parameters_is_refused(plain: Any) -> None:
    """In mode "exact" those that are not selected require no gradient between the forward pass and the next step."""
    model = copied(plain)
    selection = mebp.LayerCyclicManager(model, ratio=0.25, mode="exact")
    step(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="the optimizer lacks trainable parameters of block 1: make it of all"):
        selection.attach(optimizer)
    selection.advance()
    selection.attach(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def test_importance_follows_the_gradients_of_a_plain_model(plain: Any) -> None:
    model = copied(plain)
    selection = mebp.LayerCyclicManager(model, ratio=0.5, mode="exact", schedule="importance", seed=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    selection.attach(optimizer, "none")
    assert selection.norms == [None] * 4
    for number in range(8):
        chosen = selection.selected
        step(model)
        optimizer.step()
        if number == 0:
            assert {index for index, norm in enumerate(selection.norms) if norm is not None} == chosen
    assert all(norm is not None and norm > 0 for norm in selection.norms)
    other = mebp.LayerCyclicManager(copied(plain), ratio=0.5, mode="exact", schedule="importance", seed=2)
    other.load_state_dict(selection.state_dict())
    assert other.selected == selection.selected and other.norms == selection.norms


def test_a_copy_of_a_model_has_no_selection() -> None:
    """Its blocks are its own, and all are trained, those too that the original has frozen."""
    model = Around(False)
    mebp.LayerCyclicManager(model, ratio=0.3, mode="exact", blocks="blocks")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert not all(p.requires_grad for p in model.blocks.parameters())
    twin, plain = copy.deepcopy(model), Around(False)
    plain.load_state_dict(model.state_dict())
    for one in (twin, plain):
        one(x).sum().backward()
    for mine, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and torch.equal(mine.grad, theirs.grad)
    mebp.LayerCyclicManager(twin, blocks="blocks").remove()
