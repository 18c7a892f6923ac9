"""What a recompute leaves out: the same gradients to the bit, with fewer matrix products or none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from allocations import Products
from lora_layers import adapted, joined
from models import assert_same, batch, loaded, our_gradients, step
from pairs import pairs
from torch import Tensor, nn

import mebp_triton as mebp
from mebp_triton.blocks.engine import BlockEngine
from mebp_triton.blocks.recompute import Recompute
from mebp_triton.store.block_inputs import DeviceBlockInputs, HostBlockInputs

# --- small blocks ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two layers; ``kind`` says what happens around them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.kind = adapted(40, 24, seed=1), adapted(24, 40, seed=2), kind

    def forward(self, hidden_states: Tensor) -> Tensor:
        up = self.up(hidden_states)
        if self.kind == "clamped in place":
            up.clamp_(-1, 1)
        out = self.down(torch.tanh(up))
        if self.kind == "added in place":
            out += hidden_states
            return out
        if self.kind == "twice":
            out = self.down(torch.sigmoid(self.up(out * out)))
        if self.kind == "a square":
            return hidden_states + out * out
        if self.kind == "a part":
            return hidden_states + nn.functional.pad(out[..., :5], (0, 19))
        if self.kind == "not used":
            return hidden_states + up[..., :24]
        return hidden_states + out


KINDS = ["plain", "clamped in place", "added in place", "twice", "a square", "a part", "not used"]


@pytest.mark.parametrize(("kind", "keep", "store"), pairs(KINDS, [False, True], [DeviceBlockInputs, HostBlockInputs]))
def test_any_block_has_plain_autograds_gradients(kind: str, keep: bool, store: Any) -> None:
    """An output kept on the device that the block then changes in place is computed again."""
    plain = Block(kind)
    ours = copy.deepcopy(plain)
    engine = BlockEngine([ours], block_inputs=store(), keep_outputs=keep)
    for seed in (1, 2, 3):
        found = []
        for block in (plain, ours):
            block.zero_grad()
            x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)
            block(x).square().sum().backward()
            found.append([x.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
        for left, right in zip(*found, strict=True):
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right)
    assert (engine.recomputes[0].last is not None) == (kind not in ("twice", "a square"))
    assert all(layer.tape is None for layer in (ours.up, ours.down))


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_blocks_with_kept_outputs(kind: str) -> None:
    """In each of three steps: an output that the block changed in place is computed again where it was not copied.

    And one that seems to be unused is computed once, if it turns out to be needed.
    """
    counts: list[list[int]] = []
    for store in (DeviceBlockInputs(), HostBlockInputs()):
        block = Block(kind)
        BlockEngine([block], block_inputs=store, keep_outputs=True)
        counts.append([])
        for _ in range(3):
            output = block(torch.ones(2, 24, requires_grad=True))
            with Products() as products:
                output.sum().backward()
            counts[-1].append(len(products.rows))
    copied = [0, 1, 0] if kind == "a square" else [0, 0, 0]
    assert counts == [{"clamped in place": [1, 1, 1], "added in place": [1, 0, 0]}.get(kind, copied), copied]


def test_a_block_whose_last_layer_turns_out_to_be_needed() -> None:
    """Only sometimes: then that recompute is done again in full, and so is every later one."""
    plain = Block("plain")
    ours = copy.deepcopy(plain)
    engine = BlockEngine([ours])
    settled = []
    for kind in ["plain", "plain", "a square", "plain"]:
        found = []
        for block in (plain, ours):
            block.kind = kind
            block.zero_grad()
            block(torch.linspace(-1, 1, 48).view(2, 24)).square().sum().backward()
            found.append([p.grad for p in block.parameters() if p.requires_grad])
        assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))
        settled.append(engine.recomputes[0].last is not None)
    assert settled == [True, True, False, False]


def test_the_last_layer_is_called_twice_for_once() -> None:
    """In a forward pass that calls it more often than the one in which it was found, NaN would get between."""
    plain = Block("plain")
    ours = copy.deepcopy(plain)
    BlockEngine([ours])
    for kind in ["plain", "plain", "twice"]:
        found = []
        for block in (plain, ours):
            block.kind = kind
            block.zero_grad()
            block(torch.linspace(-1, 1, 48).view(2, 24)).sum().backward()
            found.append([p.grad for p in block.parameters() if p.requires_grad])
        assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_the_output_left_out_is_nan_and_reaches_no_gradient() -> None:
    block = Block("plain")
    engine = BlockEngine([block])
    seen: list[Tensor] = []
    block.down.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    for _ in range(2):
        x = torch.ones(2, 24, requires_grad=True)
        block(x).square().sum().backward()
    assert [bool(output.isnan().all()) for output in seen] == [False, False, False, True]
    assert engine.recomputes[0].last is block.down
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in block.parameters() if p.requires_grad)


def test_no_hook_stays_when_a_recompute_fails() -> None:
    block = Block("plain")
    recompute = Recompute(block)
    recompute.run(lambda: block(torch.ones(2, 24)), None)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="planted"):
            recompute.run(lambda: [block(torch.ones(2, 24)), (_ for _ in ()).throw(ArithmeticError("planted"))], None)
        assert not block.down._forward_hooks and block.down.tape is None
    saved = torch.ones(2, requires_grad=True)
    assert (saved * saved).grad_fn._saved_self is saved, "tensors are saved as ever"


def test_no_layer_waits_with_an_output_after_a_call() -> None:
    gate, up = adapted(40, 24, seed=1), adapted(40, 24, seed=2)
    group, holder = joined(gate, up), nn.ModuleList([gate, up])
    recompute, x = Recompute(holder), torch.ones(2, 24)
    assert recompute.shared_inputs == {group} and recompute.layers == [gate, up]
    assert torch.equal(recompute.call(lambda: gate(x)), gate(x))
    gate(x)
    with pytest.raises(ArithmeticError):
        recompute.call(lambda: (gate(x), 1 / 0))
    assert not group._waiting and group._input is None


# --- transformers' models -------------------------------------------------------------------------------------------

# gpt2 has dropout of its own while training.
CASES = [
    ("llama", True, 0.3, "device"),
    ("qwen2", False, 0.0, "file"),
    ("gpt2", False, 0.0, "host"),
    ("gpt2", True, 0.3, "file"),
    ("gemma3_text", False, 0.0, "device"),
    ("phi3", False, 0.0, "host"),
]


@pytest.mark.parametrize(("architecture", "train", "dropout", "checkpoints"), CASES)
def test_selective_equals_full_bit_for_bit(
    shared_store: Any, architecture: str, train: bool, dropout: float, checkpoints: Any, tmp_path: Any
) -> None:
    """Also after the first recompute, which finds out what can be left out, and over batches of other shapes."""
    options: dict[str, Any] = {"checkpoints": checkpoints, "scratch_directory": tmp_path}
    full, kept = (
        loaded(shared_store(architecture), {"lora_dropout": dropout}, recompute_granularity=name, **options).train(
            train
        )
        for name in ("full", "selective")
    )
    for seed, rows, length in ((1, 2, 20), (2, 3, 11), (3, 1, 17)):
        examples = batch(rows, length, seed=seed)
        assert_same(step(kept, seed, **examples), step(full, seed, **examples))


def both(store: Any) -> list[Any]:
    """A model that recomputes in full, and one that keeps outputs."""
    return [loaded(store, recompute_granularity=granularity) for granularity in ("full", "selective")]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_autocast(shared_store: Any, architecture: str) -> None:
    """On in the forward pass, off in the backward pass."""
    found = []
    for model in both(shared_store(architecture)):
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch()).loss
            loss.backward()
        found.append(our_gradients(model))
    assert_same(*found)


def test_two_backward_passes_over_one_graph_and_one_gradient_alone(shared_store: Any) -> None:
    found = []
    for model in both(shared_store("llama")):
        step(model)
        model.zero_grad()
        loss = model(**batch(), use_cache=False).loss
        loss.backward(retain_graph=True)
        loss.backward()
        parameter = model.model.layers[1].mlp.up_proj.lora_A
        alone = torch.autograd.grad(model(**batch(), use_cache=False).loss, parameter)[0]
        assert torch.equal(2 * alone, parameter.grad)
        found.append(our_gradients(model) | {"alone": alone})
    assert_same(*found)


@pytest.mark.parametrize("mode", ["exact", "identity", "freeze"])
def test_selections(shared_store: Any, mode: Any) -> None:
    found: list[list[dict[str, Tensor | None]]] = []
    for model in both(shared_store("llama")):
        selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode)
        found.append([])
        for _ in range(4):
            found[-1].append(step(model))
            selection.advance()
    for ours, truth in zip(*found, strict=True):
        assert_same(ours, truth)


@pytest.mark.parametrize(
    ("architecture", "granularity", "recomputed"),
    [
        ("llama", "full", 6),
        ("gpt2", "full", 3),
        ("gemma3_text", "full", 7),
        ("phi3", "full", 3),
        ("gpt_neox", "full", 3),
        ("llama", "selective", 0),
        ("gemma3_text", "selective", 0),
    ],
)
def test_the_products_of_a_recompute(shared_store: Any, architecture: str, granularity: Any, recomputed: int) -> None:
    """In full all but the last layer's, where additions alone follow it (Gemma has a norm there); selective none."""
    model = loaded(shared_store(architecture), recompute_granularity=granularity)
    for _ in range(2):  # finds the last layer, then leaves its output out, and sees whether that can be
        step(model)
    loss = model(**batch(), use_cache=False).loss
    with Products() as products:
        loss.backward()
    assert len(products.rows) == 3 * recomputed


class Counting:
    """Block inputs on the device, counted."""

    def __init__(self) -> None:
        self.inner, self.saved = DeviceBlockInputs(), 0

    def save(self, tensor: Tensor) -> Any:
        self.saved += 1
        return self.inner.save(tensor)


def test_identity_keeps_nothing_and_an_unused_output_is_not_kept(shared_store: Any) -> None:
    model = loaded(shared_store("llama"), recompute_granularity="selective")
    model.mebp.engine.block_inputs = store = Counting()
    counts = []
    for _ in range(2):
        step(model)
        counts.append(store.saved)
        store.saved = 0
    assert counts == [3 * 8, 3 * 7]  # the input of each block, and its seven layers' outputs
    mebp.LayerCyclicManager(model, ratio=1 / 3, mode="identity")  # the first block is trained
    model(**batch(), use_cache=False)
    assert store.saved == 1 + 6
