"""MLPs by chunks of tokens: the gradients of whole MLPs, in less memory, whatever else is going on."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from allocations import Allocations
from models import ARCHITECTURES, batch, our_gradients, randomize_adapter, relative_rms, step, tiny_config, tiny_store
from torch import Tensor, nn

import mebp_triton as mebp
from mebp_triton.blocks import mlp_chunks
from mebp_triton.blocks.mlp_chunks import ChunkedMLP
from mebp_triton.blocks.runner import find_blocks
from mebp_triton.layers import linear
from mebp_triton.models.discover import find_mlps, install_mlp_chunks

CHUNK = 7  # of 40 tokens: five whole chunks, and one of 5
WIDE = {"dtype": torch.float64, "adapter_dtype": torch.float64}
# Followed by a residual connection alone; by a norm; by a dropout inside; by that of the block.
KINDS = ["llama", "gemma3_text", "gpt2", "phi"]


@functools.cache
def stored(architecture: str) -> Any:
    return tiny_store(architecture)


def loaded(store: Any, tokens: int | None, dropout: float = 0.0, **options: Any) -> Any:
    config = mebp.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout)
    model = mebp.load(store, config, mlp_chunk_tokens=tokens, **options)
    randomize_adapter(model)
    return model


def assert_same(ours: dict[str, Any], truth: dict[str, Any], tolerance: float = 0.0) -> None:
    assert ours.keys() == truth.keys() and any(grad is not None for grad in truth.values())
    for name, grad in truth.items():
        assert (ours[name] is None) == (grad is None), name
        if grad is not None:
            assert grad.norm() > 0 and relative_rms(ours[name], grad) <= tolerance, name


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every matrix product with a weight that is not transposed, from now on."""
    seen: list[int] = []

    def count(name: str, layers: Any) -> None:
        original = getattr(linear, name)

        def counted(x: Tensor, weight: Any, *rest: Any) -> Any:
            seen.extend([x.numel() // x.shape[-1]] * layers(weight))
            return original(x, weight, *rest)

        monkeypatch.setattr(linear, name, counted)

    count("int4_matmul", lambda weight: 1)
    count("int4_matmul_group", len)
    return seen


# --- the same gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "opt"])
def test_the_gradients_of_whole_mlps(architecture: str) -> None:
    """To the last bits of float64; and in float32 as near to them as those of whole MLPs."""
    store = stored(architecture)
    ours, whole = loaded(store, CHUNK, **WIDE), loaded(store, None, **WIDE)
    mlps = [module for module in ours.modules() if isinstance(module, ChunkedMLP)]
    assert len(mlps) == 3 and not any(isinstance(module, ChunkedMLP) for module in whole.modules())
    for seed in (1, 2):  # the second recompute leaves out the products that no gradient needs
        truth = step(whole, **batch(seed=seed))
        assert_same(step(ours, **batch(seed=seed)), truth, 1e-12)
    with torch.no_grad():
        assert relative_rms(ours(**batch()).loss, whole(**batch()).loss) <= 1e-12
    single = [step(loaded(store, tokens), **batch(seed=2)) for tokens in (CHUNK, None)]
    errors = [max(relative_rms(found[name], truth[name]) for name in truth) for found in single]
    assert errors[0] <= 1.5 * errors[1] < 1e-5


@pytest.mark.parametrize("tokens", [1, 39, 40, 1000])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_number_of_tokens(tokens: int, rows: int) -> None:
    store = stored("qwen2")
    examples = batch(rows, 40 // rows)
    assert_same(step(loaded(store, tokens, **WIDE), **examples), step(loaded(store, None, **WIDE), **examples), 1e-12)


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", KINDS)
def test_the_same_dropout_masks_forward_and_backward(architecture: str, dropout: float, granularity: Any) -> None:
    """Plain autograd over the same chunked forward pass, which draws each mask once, is the truth."""
    store = tiny_store("phi", config={"resid_pdrop": 0.2}) if architecture == "phi" else stored(architecture)
    ours = loaded(store, CHUNK, dropout, recompute_granularity=granularity, **WIDE).train()
    plain = loaded(store, CHUNK, dropout, **WIDE).train()
    plain.mebp.engine.remove()
    for module in plain.modules():
        if isinstance(module, ChunkedMLP):
            module.forward = by_pieces(module)
    for seed in (1, 2, 3):
        assert_same(step(ours, seed), step(plain, seed), 1e-12)


def by_pieces(mlp: ChunkedMLP) -> Any:
    def forward(x: Tensor) -> Tensor:
        pieces = x.reshape(1, -1, x.shape[-1]).split(mlp.tokens, dim=1)
        return torch.cat([mlp.whole(piece) for piece in pieces], dim=1).view(x.shape)

    return forward


def test_without_the_block_engine() -> None:
    """One autograd function in a plain graph: also twice, and for one gradient alone."""
    store = stored("gemma3_text")
    ours, whole = loaded(store, CHUNK, **WIDE), loaded(store, None, **WIDE)
    found = []
    for model in (ours, whole):
        model.mebp.engine.remove()
        loss = model(**batch(), use_cache=False).loss
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(our_gradients(model))
        parameter = model.model.layers[1].mlp.up_proj.lora_B
        found[-1]["alone"] = torch.autograd.grad(model(**batch(), use_cache=False).loss, parameter)[0]
    assert_same(*found, 1e-12)


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("mode", ["exact", "identity"])
def test_selections(architecture: str, mode: Any) -> None:
    store = stored(architecture)
    found = []
    for tokens in (CHUNK, None):
        model = loaded(store, tokens, **WIDE)
        selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode)
        found.append([])
        for _ in range(4):
            found[-1].append(step(model))
            selection.advance()
    for ours, truth in zip(*found, strict=True):
        assert_same(ours, truth, 1e-12)


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_autocast(architecture: str, granularity: Any) -> None:
    """On in the forward pass, off in the backward pass."""
    store = stored(architecture)
    found = []
    for tokens in (CHUNK, None):
        model = loaded(store, tokens, recompute_granularity=granularity)
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch()).loss
            loss.backward()
        found.append(our_gradients(model))
    exact = step(loaded(store, None))
    for name, truth in exact.items():
        assert relative_rms(found[0][name], truth) <= 1.5 * relative_rms(found[1][name], truth) < 0.1, name


def test_gradients_of_bfloat16_adapters_are_added_up_in_float32() -> None:
    """Rounded once, as those of whole MLPs are: forty chunks of one token would show."""
    store = stored("llama")
    options = {"adapter_dtype": torch.bfloat16}
    ours, whole = step(loaded(store, 1, **options)), step(loaded(store, None, **options))
    apart = {name: (ours[name] != whole[name]).float().mean() for name in whole}
    assert all(grad.dtype == torch.bfloat16 for grad in ours.values())
    assert max(apart.values()) < 0.05  # where the sums differ in their last bit, the rounding may


def test_a_frozen_adapter_and_hooks_on_parameters() -> None:
    store = stored("llama")
    found, seen = [], []
    for tokens in (CHUNK, None):
        for engine in (True, False):
            model = loaded(store, tokens, **WIDE)
            if not engine:
                model.mebp.engine.remove()
            mlp = model.model.layers[1].mlp
            mlp.gate_proj.lora_A.requires_grad_(False)
            mlp.down_proj.lora_B.requires_grad_(False)
            calls: list[int] = []
            mlp.up_proj.lora_A.register_hook(lambda grad, calls=calls: calls.append(1) or 2 * grad)
            found.append(step(model))
            seen.append(calls)
    assert seen == [[1]] * 4
    for ours in found[:3]:
        assert_same(ours, found[3], 1e-12)


def test_adapters_in_the_mlps_alone() -> None:
    """Then the first block's MLP gets an input without a gradient."""
    store = stored("gpt_neox")
    found = []
    for tokens in (CHUNK, None):
        config = mebp.LoraConfig(r=4, lora_alpha=8, target_modules=["dense_h_to_4h", "dense_4h_to_h"])
        model = mebp.load(store, config, mlp_chunk_tokens=tokens, **WIDE)
        randomize_adapter(model)
        found.append([step(model), step(model)])
    for ours, truth in zip(*found, strict=True):
        assert_same(ours, truth, 1e-12)


def test_an_mlp_used_twice() -> None:
    store = stored("llama")
    found = []
    for tokens, granularity in ((CHUNK, "full"), (CHUNK, "selective"), (None, "full")):
        model = loaded(store, tokens, recompute_granularity=granularity, **WIDE)
        for block in model.model.layers:
            twice(block)
        found.append([step(model), step(model)])
    for ours in found[:2]:
        assert_same(ours[0], found[2][0], 1e-12)
        assert_same(ours[1], found[2][1], 1e-12)


def twice(block: Any) -> None:
    """The block's MLP runs a second time, over the norm of its output."""
    norm, mlp = block.post_attention_layernorm, block.mlp

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = norm, mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.norm(self.mlp(x) + x))

    block.mlp = Twice()


# --- with what a recompute leaves out -------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoints", ["device", "host", "file"])
@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_selective_equals_full_bit_for_bit(architecture: str, checkpoints: Any, train: bool) -> None:
    store = stored(architecture)
    full, kept = (
        loaded(store, CHUNK, checkpoints=checkpoints, recompute_granularity=granularity).train(train)
        for granularity in ("full", "selective")
    )
    for seed, rows in ((1, 2), (2, 3), (3, 1)):
        examples = batch(rows, 18 + rows, seed=seed)
        assert_same(step(kept, seed, **examples), step(full, seed, **examples))


@pytest.mark.parametrize(
    ("architecture", "granularity", "recomputed"),
    [
        ("llama", "full", 6),  # q, k, v, o, gate, up: not down, and the MLP's own forward not at all
        ("llama", "selective", 0),
        ("gemma3_text", "full", 9),  # gate, up and down once more, for the norm that follows
        ("gemma3_text", "selective", 0),
        ("gpt_neox", "full", 3),
        ("gpt_neox", "selective", 0),
    ],
)
def test_the_products_of_a_recompute(
    monkeypatch: pytest.MonkeyPatch, architecture: str, granularity: Any, recomputed: int
) -> None:
    """In rows of input, so that chunks count as what they are."""
    model = loaded(stored(architecture), CHUNK, recompute_granularity=granularity)
    step(model)  # finds out which layers come last
    step(model)
    loss = model(**batch(), use_cache=False).loss
    seen = products(monkeypatch)
    loss.backward()
    assert sum(seen) == 3 * 40 * recomputed


def test_layers_with_one_input_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(stored("llama"), CHUNK)
    together: list[int] = []
    original = linear.int4_matmul_group

    def group(x: Tensor, weights: Any, *rest: Any) -> Any:
        together.append(len(weights))
        return original(x, weights, *rest)

    monkeypatch.setattr(linear, "int4_matmul_group", group)
    with torch.no_grad():
        model(**batch())
    assert together.count(2) == 3 * 6 and together.count(3) == 3


def test_nothing_is_kept_for_a_layer_that_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(stored("llama"), CHUNK)
    mlp = model.model.layers[0].mlp
    own = type(mlp).__bases__[1]
    monkeypatch.setattr(own, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    step(model)
    assert mlp.gate_proj.shared_input.layers == (mlp.gate_proj, mlp.up_proj)
    assert not mlp.gate_proj.shared_input._waiting


def test_an_output_changed_in_place() -> None:
    """The block adds its residual to the MLP's output in place: what was kept of it is then not used."""
    store = stored("gemma3_text")
    found = []
    for tokens, granularity in ((CHUNK, "full"), (CHUNK, "selective")):
        model = loaded(store, tokens, recompute_granularity=granularity)
        for block in model.model.layers:
            block.mlp.register_forward_hook(lambda module, args, output: output.mul_(0.5))
        found.append([step(model), step(model)])
    assert_same(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3_text"])
def test_nothing_as_wide_as_the_mlp_for_all_tokens(architecture: str, granularity: Any) -> None:
    width, rows, length = 600, 2, 48
    store = tiny_store(architecture, config={"intermediate_size": width, "num_hidden_layers": 2, "layer_types": None})
    largest = {}
    for tokens in (16, None):
        model = loaded(store, tokens, recompute_granularity=granularity)
        step(model, **batch(rows, length))
        with Allocations() as made:
            step(model, **batch(rows, length))
        with Allocations() as evaluated, torch.no_grad():
            model(**batch(rows, length))
        largest[tokens] = made.largest, evaluated.largest
    assert max(largest[16]) < rows * length * width <= min(largest[None])


# --- which modules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mlps_of_the_modelling_code(architecture: str) -> None:
    config = tiny_config(architecture)
    blocks, stack = find_blocks(loaded(stored(architecture), None))
    expected = [] if architecture == "opt" else [f"{blocks}.{index}.mlp" for index in range(len(stack))]
    assert find_mlps(config, blocks) == expected


def test_blocks_without_an_mlp_of_their_own_are_left_whole() -> None:
    """OPT has its two layers in the block itself."""
    store = stored("opt")
    with pytest.warns(UserWarning, match="3 of 3 blocks of OPTForCausalLM have no MLP that can run by chunks") as seen:
        ours = loaded(store, CHUNK)
    assert len([warning for warning in seen if "chunks" in str(warning.message)]) == 1
    assert_same(step(ours), step(loaded(store, None)))


def test_a_model_that_cannot_be_looked_into_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(stored("llama"), None)

    def refuse(model: Any) -> None:
        raise ValueError("Odd does not run on the meta device: no kernel")

    monkeypatch.setattr(mlp_chunks, "run_on_meta", refuse)
    with pytest.warns(UserWarning, match="Odd does not run .* mlp_chunk_tokens=7 changes nothing"):
        install_mlp_chunks(model, model.model.layers, CHUNK)
    assert not any(isinstance(module, ChunkedMLP) for module in model.modules())


class Odd(nn.Module):
    """An MLP's name, and two linear layers; what else it has is the test's to say."""

    def __init__(self, extra: nn.Module | None = None, two: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.two = nn.Linear(48, 80), nn.Linear(80, 48), two
        self.extra = extra

    def forward(self, x: Tensor, more: Any = None) -> Any:
        y = self.down(torch.relu(self.up(x)))
        return (y, y) if self.two else y


@pytest.mark.parametrize(
    ("mlp", "chunkable"),
    [
        (Odd(), True),
        (Odd(nn.Dropout(0.1)), True),
        (Odd(nn.LayerNorm(48)), False),
        (Odd(nn.ModuleList([nn.Linear(48, 48)])), False),
        (Odd(nn.MultiheadAttention(48, 2)), False),
        (Odd(two=True), False),
        (nn.Sequential(nn.Linear(48, 24)), False),
        (nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 24)), False),
    ],
    ids=["mlp", "dropout", "norm", "experts", "attention", "a tuple", "one layer", "another width"],
)
def test_what_counts_as_an_mlp(monkeypatch: pytest.MonkeyPatch, mlp: nn.Module, chunkable: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = nn.Module()
            block.mlp = copy.deepcopy(mlp)
            self.blocks = nn.ModuleList([block])

        def forward(self, **_: Any) -> Any:
            return self.blocks[0].mlp(torch.zeros(1, 2, 48, device="meta"))

    monkeypatch.setattr(mlp_chunks, "meta_model", lambda config: Model().to("meta"))
    assert find_mlps(None, "blocks") == (["blocks.0.mlp"] if chunkable else [])


def test_an_mlp_that_is_called_with_more_runs_whole() -> None:
    model = loaded(stored("llama"), CHUNK)
    mlp = model.model.layers[0].mlp
    sizes: list[int] = []
    mlp.up_proj.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    x = torch.randn(1, 20, 48)
    with torch.no_grad():
        whole = mlp(x=x)
        assert sizes == [20]
        torch.testing.assert_close(mlp(x), whole)
    assert sizes == [20, 7, 7, 6]
    assert mlp(x[:, :0]).shape == (1, 0, 48)


@pytest.mark.parametrize("tokens", [-1, 2.0, "16", True])
def test_a_number_of_tokens_that_is_none(tokens: Any) -> None:
    model = loaded(stored("llama"), None)
    with pytest.raises(ValueError, match="mlp_chunk_tokens must be a whole number of tokens, or 0 for whole MLPs, got"):
        install_mlp_chunks(model, model.model.layers, tokens)


@pytest.mark.parametrize("tokens", [0, None])
def test_off(tokens: Any) -> None:
    model = loaded(stored("llama"), tokens)
    assert not any(isinstance(module, ChunkedMLP) for module in model.modules())


def test_a_copy_of_the_model_stands_alone() -> None:
    model = loaded(stored("llama"), CHUNK)
    before = step(model)
    twin = copy.deepcopy(model.model.layers[0].mlp)
    assert twin.inner.layers[0] is twin.gate_proj
    assert type(twin).__name__ == "ChunkedLlamaMLP" and isinstance(twin, type(model.model.layers[0].mlp))
    with torch.no_grad():
        torch.testing.assert_close(twin(torch.ones(1, 9, 48)), model.model.layers[0].mlp(torch.ones(1, 9, 48)))
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert_same(step(model), before)
