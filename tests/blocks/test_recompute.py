"""What a recompute leaves out: the same gradients to the bit, with fewer matrix products or none."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from models import batch, our_gradients, randomize_adapter, step, tiny_store
from torch import Tensor, nn

import mebp_triton as mebp
from mebp_triton.blocks.engine import BlockEngine
from mebp_triton.blocks.replay import ForwardState
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.layers import linear
from mebp_triton.layers.linear import Int4LoRALinear
from mebp_triton.store.block_inputs import DeviceBlockInputs, HostBlockInputs


@functools.cache
def stored(architecture: str) -> Any:
    return tiny_store(architecture)


def loaded(architecture: str, granularity: Any, dropout: float = 0.0, **options: Any) -> Any:
    config = mebp.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout)
    model = mebp.load(stored(architecture), config, recompute_granularity=granularity, **options)
    randomize_adapter(model)
    return model


def assert_equal(ours: dict[str, Any], truth: dict[str, Any]) -> None:
    assert ours.keys() == truth.keys() and any(grad is not None for grad in truth.values())
    for name, grad in truth.items():
        assert (ours[name] is None) == (grad is None), name
        if grad is not None:
            assert grad.norm() > 0 and torch.equal(ours[name], grad), name


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each computation of outputs multiplied with."""
    seen: list[int] = []
    one, several = linear.int4_matmul, linear.int4_matmul_group
    monkeypatch.setattr(linear, "int4_matmul", lambda *args: seen.append(1) or one(*args))
    monkeypatch.setattr(
        linear, "int4_matmul_group", lambda x, weights, *rest: seen.append(len(weights)) or several(x, weights, *rest)
    )
    return seen


# --- selective ------------------------------------------------------------------------------------------------------

# gpt2 has dropout of its own while training.
CASES = [
    ("llama", False, 0.0),
    ("llama", True, 0.3),
    ("qwen2", False, 0.0),
    ("gpt2", False, 0.0),
    ("gpt2", True, 0.0),
    ("gpt2", True, 0.3),
    ("gemma3_text", False, 0.0),
    ("phi3", False, 0.0),
]


@pytest.mark.parametrize(("architecture", "train", "dropout"), CASES)
def test_selective_equals_full_bit_for_bit(architecture: str, train: bool, dropout: float) -> None:
    """Also after the first recompute, which finds out what can be left out, and over batches of other shapes."""
    full, kept = (loaded(architecture, name, dropout).train(train) for name in ("full", "selective"))
    for seed, rows, length in ((1, 2, 20), (2, 3, 11), (3, 1, 17)):
        examples = batch(rows, length, seed=seed)
        assert_equal(step(kept, seed, **examples), step(full, seed, **examples))


@pytest.mark.parametrize("checkpoints", ["device", "host", "file"])
def test_wherever_the_outputs_wait(checkpoints: Any, tmp_path: Any) -> None:
    truth = step(loaded("qwen2", "full"))
    model = loaded("qwen2", "selective", checkpoints=checkpoints, scratch_directory=tmp_path)
    for _ in range(3):
        assert_equal(step(model), truth)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_autocast(architecture: str) -> None:
    """On in the forward pass, off in the backward pass."""
    found = []
    for granularity in ("full", "selective"):
        model = loaded(architecture, granularity)
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch()).loss
            loss.backward()
        found.append(our_gradients(model))
    assert_equal(*found)


def test_two_backward_passes_over_one_graph_and_one_gradient_alone() -> None:
    found = []
    for granularity in ("full", "selective"):
        model = loaded("llama", granularity)
        step(model)
        model.zero_grad()
        loss = model(**batch(), use_cache=False).loss
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(our_gradients(model))
        parameter = model.model.layers[1].mlp.up_proj.lora_A
        found[-1]["alone"] = torch.autograd.grad(model(**batch(), use_cache=False).loss, parameter)[0]
    assert_equal(found[1], found[0])
    assert_equal({"twice": found[0]["alone"] * 2}, {"twice": our_gradients(model)[name_of(model, parameter)]})


def name_of(model: Any, parameter: nn.Parameter) -> str:
    path = next(name for name, own in model.named_parameters() if own is parameter)
    return f"base_model.model.{path}.weight"


@pytest.mark.parametrize("mode", ["exact", "identity", "freeze"])
def test_selections(mode: Any) -> None:
    found: list[list[dict[str, Tensor | None]]] = []
    for granularity in ("full", "selective"):
        model = loaded("llama", granularity)
        selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode)
        found.append([])
        for _ in range(4):
            found[-1].append(step(model))
            selection.advance()
    for ours, truth in zip(found[1], found[0], strict=True):
        assert_equal(ours, truth)


@pytest.mark.parametrize(
    ("architecture", "recomputed"), [("llama", 6), ("gpt2", 3), ("gemma3_text", 7), ("phi3", 3), ("gpt_neox", 3)]
)
def test_the_products_of_a_recompute(products: list[int], architecture: str, recomputed: int) -> None:
    """In full all but the last layer's, where additions alone follow it (Gemma has a norm there); selective none."""
    for granularity, expected in (("full", recomputed), ("selective", 0)):
        model = loaded(architecture, granularity)
        step(model)  # finds the last layer
        step(model)  # leaves its output out, and sees whether that can be
        loss = model(**batch(), use_cache=False).loss
        products.clear()
        loss.backward()
        assert sum(products) == 3 * expected, granularity
    assert all(not recompute.layers[0].tape for recompute in model.mebp.engine.recomputes)


def test_identity_keeps_nothing() -> None:
    model = loaded("llama", "selective")
    mebp.LayerCyclicManager(model, ratio=1 / 3, mode="identity")  # the first block is trained
    store = model.mebp.engine.block_inputs
    saved: list[Tensor] = []
    save = store.save
    store.save = lambda tensor: saved.append(tensor) or save(tensor)
    model(**batch(), use_cache=False)
    assert len(saved) == 1 + 7


def test_what_is_known_to_be_unused_is_not_kept() -> None:
    model = loaded("llama", "selective")
    store = model.mebp.engine.block_inputs
    saved: list[Tensor] = []
    save = store.save
    store.save = lambda tensor: saved.append(tensor) or save(tensor)
    counts = []
    for _ in range(2):
        step(model)
        counts.append(len(saved))
        saved.clear()
    assert counts == [3 * 8, 3 * 7]


# --- blocks of other kinds ------------------------------------------------------------------------------------------


def layer(n: int, k: int, seed: int, dropout: float = 0.0) -> Int4LoRALinear:
    generator = torch.Generator().manual_seed(seed)
    weight, _ = quantize_matrix(torch.randn(n, k, generator=generator), "symmetric", 32)
    made = Int4LoRALinear(weight, None, torch.float32, 3, 0.5, dropout, generator=generator)
    nn.init.normal_(made.lora_B, generator=generator)
    return made


class Block(nn.Module):
    """Two layers; what happens around them is ``kind``'s to say."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.kind = layer(40, 24, 1), layer(24, 40, 2), kind

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


@pytest.mark.parametrize("store", [DeviceBlockInputs, HostBlockInputs])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_blocks_of_other_kinds(products: list[int], kind: str) -> None:
    """What was changed in place is computed again where no copy of it was made; nothing else is."""
    counts = []
    for store in (DeviceBlockInputs(), HostBlockInputs()):
        block = Block(kind)
        BlockEngine([block], block_inputs=store, keep_outputs=True)
        for _ in range(3):
            output = block(torch.ones(2, 24, requires_grad=True))
            products.clear()
            output.sum().backward()
        counts.append(sum(products))
    assert counts == [1 if kind == "clamped in place" else 0, 0]


def test_a_block_whose_last_layer_turns_out_to_be_needed() -> None:
    """Only sometimes: then that recompute is done again in full, and every later one is."""
    plain = Block("plain")
    ours = copy.deepcopy(plain)
    engine = BlockEngine([ours])
    kinds = ["plain", "plain", "a square", "plain"]
    settled = []
    for kind in kinds:
        found = []
        for block in (plain, ours):
            block.kind = kind
            block.zero_grad()
            block(torch.linspace(-1, 1, 48).view(2, 24)).square().sum().backward()
            found.append([p.grad for p in block.parameters() if p.requires_grad])
        assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))
        settled.append(engine.recomputes[0].last is not None)
    assert settled == [True, True, False, False]


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


# --- surroundings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [False, True])
def test_surroundings(random: bool) -> None:
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        now = ForwardState(torch.device("cpu"), random)
    first = torch.rand(4)
    with now.replayed():
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.equal(torch.rand(4), first) == random
    assert not torch.is_autocast_enabled("cpu")
