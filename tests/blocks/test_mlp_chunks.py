"""MLPs by chunks of tokens: the gradients of whole MLPs, in less memory, whatever else is going on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import Allocations, Products
from lora_layers import adapted, joined
from models import assert_same, batch, loaded, our_gradients, relative_rms, step
from pairs import pairs
from torch import Tensor, nn

import mebp_triton as mebp
from mebp_triton.blocks.engine import BlockEngine
from mebp_triton.blocks.mlp_chunks import ChunkedMLP, chunk_mlp
from mebp_triton.store.block_inputs import DeviceBlockInputs, FileBlockInputs, HostBlockInputs

CHUNK = 16  # of 40 tokens: two whole chunks, and one of 8
TOKENS = 40
WIDE = {"dtype": torch.float64, "adapter_dtype": torch.float64}


# --- small blocks ---------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Gate and up share their input; between them and down there may be a dropout, and after down an activation."""

    def __init__(
        self, inner: float = 0.0, lora: float = 0.0, dtype: torch.dtype = torch.float64, activated: bool = False
    ) -> None:
        super().__init__()
        self.activated = activated
        options: dict[str, Any] = {"adapter_dtype": dtype, "dropout": lora}
        self.gate, self.up = adapted(40, 24, seed=1, **options), adapted(40, 24, seed=2, **options)
        self.down, self.dropout = adapted(24, 40, seed=3, **options), nn.Dropout(inner)
        joined(self.gate, self.up)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.down(self.dropout(torch.tanh(self.gate(x)) * self.up(x))) * scale
        return torch.tanh(y) if self.activated else y


class Block(nn.Module):
    """A layer, then an MLP; ``kind`` says what happens to the MLP's output."""

    def __init__(self, kind: str = "residual", **options: Any) -> None:
        super().__init__()
        self.kind, self.first = kind, adapted(24, 24, seed=4, adapter_dtype=torch.float64)
        self.mlp = MLP(activated=kind == "activated", **options)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states + torch.tanh(self.first(hidden_states))
        y = self.mlp(nn.functional.layer_norm(x, (24,)))
        if self.kind == "norm":
            y = nn.functional.layer_norm(y, (24,))
        elif self.kind == "dropout":
            y = nn.functional.dropout(y, 0.3, self.training)
        elif self.kind == "changed in place":
            y.mul_(0.5)
        elif self.kind == "used twice":
            y = self.mlp(nn.functional.layer_norm(y + x, (24,)))
        return x + y


KINDS = ["residual", "activated", "norm", "dropout", "changed in place", "used twice"]


def two(kind: str = "residual", **options: Any) -> list[Block]:
    return [Block(kind, **options) for _ in range(2)]


def chunked(blocks: list[Block], tokens: int = CHUNK) -> list[Block]:
    for block in blocks:
        chunk_mlp(block.mlp, tokens)
    return blocks


def run(blocks: list[Block], seed: int = 0, rows: int = 2, tokens: int = TOKENS, grad: bool = True) -> dict[str, Any]:
    """The gradients of one step, and the loss, over ``tokens`` tokens in ``rows`` rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens // rows, 24, generator=generator, dtype=torch.float64).requires_grad_(grad)
    for block in blocks:
        block.zero_grad()
    torch.manual_seed(seed)
    hidden = x
    for block in blocks:
        hidden = block(hidden)
    loss = hidden.square().sum()
    loss.backward()
    found = {f"{i}.{n}": p.grad for i, b in enumerate(blocks) for n, p in b.named_parameters() if p.requires_grad}
    return found | {"x": x.grad, "loss": loss.detach(), "random": torch.rand(1)}


def in_pieces(blocks: list[Block], tokens: int = CHUNK) -> list[Block]:
    """Plain autograd over the chunked forward pass, which draws each random number once."""

    def forward(whole: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        pieces = x.reshape(1, -1, x.shape[-1]).split(tokens, dim=1)
        return torch.cat([whole(piece) for piece in pieces], dim=1).view(x.shape)

    for block in blocks:
        block.mlp.forward = functools.partial(forward, block.mlp.forward)  # type: ignore[method-assign]
    return blocks


@pytest.mark.parametrize("tokens", [1, 39, 40, 1000])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_number_of_tokens(tokens: int, rows: int) -> None:
    ours, whole = chunked(two(), tokens), two()
    BlockEngine(ours)
    for seed in (1, 2):  # the second recompute leaves out what no gradient needs
        assert_same(run(ours, seed, rows), run(whole, seed, rows), 1e-12)


@pytest.mark.parametrize(
    ("kind", "engine", "keep_outputs"),
    [*((kind, True, keep) for kind in KINDS for keep in (False, True))] + [(kind, False, False) for kind in KINDS],
)
def test_any_block_has_the_gradients_of_its_whole_mlp(kind: str, engine: bool, keep_outputs: bool) -> None:
    ours, whole = chunked(two(kind)), two(kind)
    for block in (*ours, *whole):
        block.eval()
    if engine:
        BlockEngine(ours, keep_outputs=keep_outputs)
    for seed, tokens in ((1, 40), (2, 40), (3, 10)):
        assert_same(run(ours, seed, tokens=tokens), run(whole, seed, tokens=tokens), 1e-12)


@pytest.mark.parametrize(("kind", "inner", "lora", "keep_outputs"), pairs(KINDS, [0.2, 0.0], [0.3, 0.0], [False, True]))
def test_the_same_dropout_masks_forward_and_backward(kind: str, inner: float, lora: float, keep_outputs: bool) -> None:
    ours, plain = chunked(two(kind, inner=inner, lora=lora)), in_pieces(two(kind, inner=inner, lora=lora))
    BlockEngine(ours, keep_outputs=keep_outputs)
    for seed in (1, 2, 3):
        assert_same(run(ours, seed), run(plain, seed), 1e-12)


@pytest.mark.parametrize(
    ("kind", "inner", "store"), pairs(KINDS, [0.0, 0.2], [DeviceBlockInputs, HostBlockInputs, FileBlockInputs])
)
def test_kept_outputs_change_no_bit(kind: str, inner: float, store: Any, tmp_path: Any) -> None:
    place = store(tmp_path) if store is FileBlockInputs else store()
    full, kept = chunked(two(kind, inner=inner)), chunked(two(kind, inner=inner))
    BlockEngine(full)
    BlockEngine(kept, block_inputs=place, keep_outputs=True)
    for seed, rows in ((1, 2), (2, 4), (3, 1)):
        assert_same(run(kept, seed, rows), run(full, seed, rows))


@pytest.mark.parametrize(
    ("kind", "keep_outputs", "recomputed"),
    [
        ("residual", False, 3),  # the first layer, gate and up: not down, and the MLP's own forward not at all
        ("residual", True, 0),
        ("norm", False, 6),  # gate, up and down once more, for the norm that follows
        ("norm", True, 0),
        ("used twice", False, 11),  # the MLP's forward for each use, and then gate and up
        ("used twice", True, 0),
        ("changed in place", True, 0),  # the MLP runs again, without its layers
    ],
)
def test_the_products_of_a_recompute(kind: str, keep_outputs: bool, recomputed: int) -> None:
    """In rows of input, so that chunks count as what they are."""
    blocks = chunked([Block(kind).eval()])
    BlockEngine(blocks, keep_outputs=keep_outputs)
    for seed in (1, 2):  # finds out which layers come last, and leaves their outputs out
        run(blocks, seed)
    loss = blocks[0](torch.ones(2, 20, 24, dtype=torch.float64, requires_grad=True)).square().sum()
    with Products() as products:
        loss.backward()
    assert sum(products.rows) == TOKENS * recomputed


@pytest.mark.parametrize("engine", [False, True])
def test_two_backward_passes_over_one_graph_and_one_gradient_alone(engine: bool) -> None:
    results = []
    for blocks in (chunked(two("norm")), two("norm")):
        if engine:
            BlockEngine(blocks)
        x = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        loss = blocks[1](blocks[0](x)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        alone = blocks[0].mlp.up.lora_B
        found = {n: p.grad for b in blocks for n, p in b.named_parameters() if p.requires_grad}
        found["alone"] = torch.autograd.grad(blocks[1](blocks[0](x)).square().sum(), alone)[0]
        assert torch.allclose(alone.grad, 2 * found["alone"], rtol=1e-12)
        results.append(found)
    assert_same(*results, 1e-12)


@pytest.mark.parametrize("engine", [False, True])
def test_frozen_parameters_and_hooks_on_parameters(engine: bool) -> None:
    results, calls = [], []
    for blocks in (chunked(two()), two()):
        if engine:
            BlockEngine(blocks)
        mlp = blocks[1].mlp
        mlp.gate.lora_A.requires_grad_(False)
        mlp.down.lora_B.requires_grad_(False)
        mlp.up.lora_A.register_hook(lambda grad: calls.append(grad.norm()) or 2 * grad)
        results.append(run(blocks))
    assert len(calls) == 2 and torch.allclose(*calls, rtol=1e-12)
    assert_same(*results, 1e-12)


def test_hooks_on_the_mlp_run_once_and_see_all_tokens() -> None:
    seen: list[tuple[int, ...]] = []
    blocks = chunked([Block()])
    blocks[0].mlp.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    run(blocks)
    assert seen == [(2, 20, 24)]


def test_an_input_without_a_gradient() -> None:
    """As the first block's MLP has where only MLPs are adapted."""
    results = []
    for mlp in (MLP(), MLP()):
        if not results:
            chunk_mlp(mlp, CHUNK)
        x = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mlp(x).square().sum().backward()
        assert x.grad is None
        results.append({n: p.grad for n, p in mlp.named_parameters() if p.requires_grad})
    assert_same(*results, 1e-12)


def test_an_mlp_without_trainable_parameters_passes_the_gradient() -> None:
    results = []
    for mlp in (MLP().requires_grad_(False), MLP().requires_grad_(False)):
        if not results:
            chunk_mlp(mlp, CHUNK)
        x = torch.linspace(-1, 1, 960, dtype=torch.float64).view(2, 20, 24).requires_grad_(True)
        mlp(x).square().sum().backward()
        results.append({"x": x.grad})
        assert not mlp(x.detach()).requires_grad
    assert_same(*results, 1e-12)


def test_gradients_of_bfloat16_adapters_are_added_up_in_float32() -> None:
    """They are rounded once, as those of whole MLPs are: forty chunks of one token would show."""
    gradients = []
    for tokens in (1, None):
        mlp = MLP(dtype=torch.bfloat16)
        if tokens is not None:
            chunk_mlp(mlp, tokens)
        x = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(0))
        mlp(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in mlp.named_parameters() if p.requires_grad})
    assert all(grad.dtype == torch.bfloat16 for grad in gradients[0].values())
    apart = [(gradients[0][name] != whole).float().mean() for name, whole in gradients[1].items()]
    assert max(apart) < 0.1  # where the sums differ in their last bit, the rounding may


def test_what_the_mlp_is_called_with() -> None:
    """By chunks only with its input alone, and at least one token of it."""
    mlp = MLP()
    chunk_mlp(mlp, 7)
    sizes: list[int] = []
    mlp.up.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = mlp(x=x)
        assert sizes == [20]
        torch.testing.assert_close(mlp(x), whole)
    assert sizes == [20, 7, 7, 6]
    assert mlp(x[:, :0]).shape == (1, 0, 24)
    del sizes[:]
    with torch.no_grad():
        torch.testing.assert_close(mlp(x, 2.0), 2 * whole)
        torch.testing.assert_close(mlp(x, scale=2.0), 2 * whole)
    assert sizes == [20, 20]


def test_layers_with_one_input_stay_together() -> None:
    blocks = chunked([Block()])
    BlockEngine(blocks)
    nodes: dict[str, list[Any]] = {"gate": [], "up": []}
    for name, found in nodes.items():
        layer = getattr(blocks[0].mlp, name)
        layer.register_forward_hook(lambda module, args, output, found=found: found.append(output.grad_fn))
    run(blocks)
    made = [node for node in nodes["gate"] if node is not None]
    assert len(made) == 3 and nodes["up"] == nodes["gate"], "one node of the graph for each chunk"


def test_nothing_is_kept_for_a_layer_that_is_not_called() -> None:
    mlp = MLP()
    mlp.__class__ = type("Odd", (MLP,), {"forward": lambda self, x: self.down(torch.tanh(self.gate(x)))})
    chunk_mlp(mlp, CHUNK)
    mlp(torch.ones(1, 20, 24, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert mlp.gate.shared_input.layers == (mlp.gate, mlp.up)
    assert not mlp.gate.shared_input._waiting


def test_a_copy_stands_alone() -> None:
    mlp = MLP()
    chunk_mlp(mlp, CHUNK)
    twin = copy.deepcopy(mlp)
    assert twin.inner.layers[0] is twin.gate and twin.inner.shared_inputs == {twin.gate.shared_input}
    assert type(twin).__name__ == "ChunkedMLP" and isinstance(twin, MLP) and isinstance(twin, ChunkedMLP)
    x = torch.ones(1, 20, 24, dtype=torch.float64)
    with torch.no_grad():
        before = mlp(x)
        assert torch.equal(twin(x), before)
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
        assert torch.equal(mlp(x), before) and not torch.equal(twin(x), before)


# --- transformers' models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3", "gpt2", "gpt_neox", "phi"])
def test_the_gradients_of_whole_mlps(shared_store: Any, architecture: str) -> None:
    store = shared_store(architecture)
    ours, whole = loaded(store, mlp_chunk_tokens=CHUNK, **WIDE), loaded(store, **WIDE)
    for seed in (1, 2):
        assert_same(step(ours, **batch(seed=seed)), step(whole, **batch(seed=seed)), 1e-12)
    with torch.no_grad():
        assert relative_rms(ours(**batch()).loss, whole(**batch()).loss) <= 1e-12


def test_in_float32_they_are_as_near_to_the_truth_as_whole_mlps(shared_store: Any) -> None:
    store = shared_store("llama")
    truth = step(loaded(store, **WIDE))
    single = [step(loaded(store, mlp_chunk_tokens=tokens)) for tokens in (CHUNK, None)]
    errors = [max(relative_rms(found[name], truth[name]) for name in truth) for found in single]
    assert errors[0] <= 1.5 * errors[1] < 1e-5


@pytest.mark.parametrize(
    ("architecture", "checkpoints", "train"),
    [("llama", "device", True), ("gemma3_text", "host", False), ("gpt2", "file", True), ("phi", "device", False)],
)
def test_selective_equals_full_bit_for_bit(
    shared_store: Any, architecture: str, checkpoints: Any, train: bool, tmp_path: Any
) -> None:
    options: dict[str, Any] = {"checkpoints": checkpoints, "scratch_directory": tmp_path, "mlp_chunk_tokens": CHUNK}
    full, kept = (
        loaded(shared_store(architecture), recompute_granularity=granularity, **options).train(train)
        for granularity in ("full", "selective")
    )
    for seed, rows in ((1, 2), (2, 3), (3, 1)):
        examples = batch(rows, 18 + rows, seed=seed)
        assert_same(step(kept, seed, **examples), step(full, seed, **examples))


@pytest.mark.parametrize(
    ("architecture", "mode"), [("llama", "exact"), ("gemma3_text", "identity"), ("gpt2", "identity"), ("phi", "exact")]
)
def test_selections(shared_store: Any, architecture: str, mode: Any) -> None:
    results = []
    for tokens in (CHUNK, None):
        model = loaded(shared_store(architecture), mlp_chunk_tokens=tokens, **WIDE)
        selection = mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode)
        results.append([])
        for _ in range(4):
            results[-1].append(step(model))
            selection.advance()
    for ours, truth in zip(*results, strict=True):
        assert_same(ours, truth, 1e-12)


@pytest.mark.parametrize(("architecture", "granularity"), [("llama", "selective"), ("gemma3_text", "full")])
def test_autocast(shared_store: Any, architecture: str, granularity: Any) -> None:
    """On in the forward pass, off in the backward pass."""
    store = shared_store(architecture)
    results = []
    for tokens in (CHUNK, None):
        model = loaded(store, mlp_chunk_tokens=tokens, recompute_granularity=granularity)
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch()).loss
            loss.backward()
        results.append(our_gradients(model))
    for name, truth in step(loaded(store)).items():
        assert relative_rms(results[0][name], truth) <= 1.5 * relative_rms(results[1][name], truth) < 0.1, name


@pytest.mark.parametrize(
    ("architecture", "granularity"), [("llama", "full"), ("phi3", "selective"), ("gemma3_text", "full")]
)
def test_nothing_as_wide_as_the_mlp_for_all_tokens(shared_store: Any, architecture: str, granularity: Any) -> None:
    width, rows, length = 600, 2, 48
    config = {"intermediate_size": width, "num_hidden_layers": 2, "layer_types": None}
    store = shared_store(architecture, config=config)
    largest = {}
    for tokens in (16, None):
        model = loaded(store, mlp_chunk_tokens=tokens, recompute_granularity=granularity)
        step(model, **batch(rows, length))
        with Allocations() as made:
            step(model, **batch(rows, length))
        with Allocations() as evaluated, torch.no_grad():
            model(**batch(rows, length))
        largest[tokens] = made.largest, evaluated.largest
    assert max(largest[16]) < rows * length * width <= min(largest[None])
