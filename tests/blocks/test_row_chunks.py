"""A batch in chunks of rows: its outputs and gradients are those of the whole batch, and weights come once per pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import assert_same, batch, loaded, our_gradients, relative_rms, step
from stacks import Block, Stack, equal_bits, grads
from torch import Tensor, nn
from transformers import DynamicCache

import mebp_triton as mebp
from mebp_triton.blocks.call import Arguments
from mebp_triton.blocks.engine import BlockEngine
from mebp_triton.blocks.row_chunks import Cut, cut
from mebp_triton.store.block_inputs import FileBlockInputs
from mebp_triton.store.pages import Pages

HIDDEN = torch.zeros(5, 3, 4)
ARGUMENT = {"[1]['hidden_states']": 0, "[1]['scale']": 0, "[0][0]": 0}  # of the blocks in ``stacks``


def chunked(stack: nn.Module, rows: int = 2, **options: Any) -> BlockEngine:
    blocks: Any = stack.blocks
    return BlockEngine(blocks, block_rows=rows, row_places=[ARGUMENT] * len(blocks), **options)


def pair(**options: Any) -> tuple[Stack, Stack, BlockEngine, Tensor]:
    """A plain stack, its copy whose blocks take two rows at a time, that engine, and five rows."""
    plain = Stack()
    ours = copy.deepcopy(plain)
    return plain, ours, chunked(ours, **options), torch.randn(5, 3, 6, dtype=torch.float64)


def close(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    """Whether both have gradients in the same places, and these differ by the order of summation at most."""
    assert any(gradient is not None for gradient in theirs)
    for left, right in zip(ours, theirs, strict=True):
        if (left is None) != (right is None) or left is not None and relative_rms(left, right) > 1e-13:
            return False
    return True


# --- how arguments are cut ------------------------------------------------------------------------------------------


def cut_of(places: dict[str, int | None], **kwargs: Any) -> Cut | str:
    return cut(places, Arguments((HIDDEN,), kwargs), HIDDEN, 2)


def test_a_batch_is_cut_into_chunks_of_which_the_last_may_be_smaller() -> None:
    found = cut_of({"[0][0]": 0, "[1]['angles']": 1}, angles=torch.zeros(3, 5, 7), flag="kept", nothing=None)
    assert isinstance(found, Cut) and found.spans == [(0, 2), (2, 4), (4, 5)] and found.dims == [0, 1, None, None]
    parts = [found.part([HIDDEN, torch.zeros(3, 5, 7), "kept", None], *span) for span in found.spans]
    assert [(part[0].shape[0], part[1].shape[1], part[2]) for part in parts] == [
        (2, 2, "kept"),
        (2, 2, "kept"),
        (1, 1, "kept"),
    ]


@pytest.mark.parametrize(
    ("place", "shape", "dim"),
    [
        (0, (5, 1, 3), 0),
        (0, (1, 1, 3), None),  # one for all rows, where the model was loaded with one for each
        (None, (5,), None),  # as long as the batch by chance
        ("unseen", (1, 3), None),
        ("unseen", (5, 3), 0),  # rows and tokens of the hidden state
    ],
)
def test_the_dimension_of_an_argument(place: Any, shape: tuple[int, ...], dim: int | None) -> None:
    places = {"[0][0]": 0} | ({} if place == "unseen" else {"[1]['mask']": place})
    found = cut_of(places, mask=torch.zeros(shape))
    assert isinstance(found, Cut) and found.dims == [0, dim]


@pytest.mark.parametrize(
    ("places", "mask"),
    [
        ({"[1]['mask']": 0}, torch.zeros(4, 3)),
        ({"[1]['mask']": 2}, torch.zeros(5, 3)),
        ({}, torch.zeros(5, 1, 3)),
        ({}, DynamicCache()),
    ],
)
def test_what_cannot_be_cut_is_said(places: dict[str, int | None], mask: Any) -> None:
    found = cut_of({"[0][0]": 0} | places, mask=mask)
    assert isinstance(found, str) and "['mask']" in found


def test_a_square_hidden_state_does_not_tell_rows_from_tokens() -> None:
    square = torch.zeros(3, 3, 4)
    found = cut({"[0][0]": 0}, Arguments((square, torch.zeros(3, 3)), {}), square, 2)
    assert isinstance(found, str)


# --- outputs and gradients ------------------------------------------------------------------------------------------


def test_equal_to_the_whole_batch() -> None:
    plain, ours, engine, x = pair()
    x.requires_grad_(True)
    own = x.detach().clone().requires_grad_(True)
    for _ in range(2):
        plain.zero_grad()
        ours.zero_grad()
        x.grad = own.grad = None
        a, b = plain(x), ours(own)
        a.backward()
        b.backward()
        assert relative_rms(b.detach(), a.detach()) < 1e-14 and close(grads(ours), grads(plain))
        assert own.grad is not None and x.grad is not None and relative_rms(own.grad, x.grad) < 1e-13
        assert engine.counters.pop_counts() == {"forward": 4, "recompute": 4, "identity": 0, "checkpoint": 4}


@pytest.mark.parametrize("mode", ["exact", "identity"])
def test_blocks_that_are_not_trained(mode: Any) -> None:
    plain, ours, engine, x = pair()
    whole = BlockEngine(plain.blocks)
    engine.treatment = whole.treatment = lambda index: "train" if index in (0, 2) else mode
    plain(x).backward()
    ours(x).backward()
    assert close(grads(ours), grads(plain))
    assert engine.counters == whole.counters


def test_a_batch_of_one_chunk_is_computed_as_without_chunks() -> None:
    plain, ours, _, x = pair(rows=5)
    BlockEngine(plain.blocks)
    plain(x).backward()
    ours(x).backward()
    assert equal_bits(grads(ours), grads(plain))


def test_without_a_graph_a_batch_comes_in_chunks_too() -> None:
    plain, ours, _, x = pair()
    rows: list[int] = []
    ours.blocks[0].up.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[0]))
    with torch.no_grad():
        assert relative_rms(ours(x), plain(x)) < 1e-14
    assert rows == [2, 2, 1]


def test_weights_are_in_place_once_per_pass() -> None:
    class Entered(Pages):
        times = 0

        def __enter__(self) -> None:
            Entered.times += 1

    _, ours, engine, x = pair(pages=[Entered()] * 4)
    seen: list[Any] = []
    engine.observer = lambda *event: seen.append(event)
    ours(x).backward()
    assert Entered.times == 8 and len(seen) == 8, "four blocks, forward and backward"


class Scaled(nn.Module):
    """Blocks with an argument that all rows share, whose output is multiplied by it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(6)]).double()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.blocks[0](hidden_states=x, scale=scale)[0].square().sum()


@pytest.mark.parametrize("rows", [1, 5])
def test_the_gradient_of_an_input_of_all_rows_and_of_one_of_each(rows: int) -> None:
    plain, ours = Scaled(), Scaled()
    chunked(ours)
    x, scales = torch.randn(5, 3, 6, dtype=torch.float64), torch.randn(2, rows, 1, 1, dtype=torch.float64)
    theirs, own = (scales[0].clone().requires_grad_(True) for _ in range(2))
    plain(x, theirs).backward()
    ours(x, own).backward()
    assert own.grad is not None and theirs.grad is not None
    assert relative_rms(own.grad, theirs.grad) < 1e-13 and close(grads(ours), grads(plain))


def test_gradients_of_the_chunks_are_added_up_in_float32() -> None:
    """In bfloat16, 256 + 1 is 256: eight rows more would be lost one by one."""

    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)])

    ours = Times()
    chunked(ours, rows=1)
    x = torch.ones(9, 1, dtype=torch.bfloat16)
    x[0] = 256
    ours.blocks[0](x).float().sum().backward()
    weight: Any = ours.blocks[0].weight
    assert weight.grad.dtype == torch.bfloat16 and weight.grad.item() == 264


def test_hooks_on_parameters_run_once() -> None:
    _, ours, _, x = pair()
    seen: list[Tensor] = []
    ours.blocks[1].up.weight.register_hook(seen.append)
    ours(x).backward()
    assert len(seen) == 1


def test_a_second_backward_pass_gives_the_same() -> None:
    _, ours, _, x = pair(block_inputs=None)
    loss = ours(x)
    loss.backward(retain_graph=True)
    first = grads(ours)
    ours.zero_grad()
    loss.backward()
    assert equal_bits(grads(ours), first)


def test_an_input_that_changes_between_the_passes_is_an_error(tmp_path: Any) -> None:
    _, ours, _, x = pair(block_inputs=FileBlockInputs(tmp_path))
    loss = ours(x)
    with torch.no_grad():
        ours.blocks[2].up.weight.add_(1)
    with pytest.raises(RuntimeError, match="block 2 changed"):
        loss.backward()


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.linear(self.dropout(hidden_states))


def test_each_chunk_draws_its_own_random_numbers_and_its_recompute_the_same() -> None:
    torch.manual_seed(0)
    ours = nn.Module()
    ours.blocks = nn.ModuleList([Dropping()]).double()
    plain = copy.deepcopy(ours)
    chunked(ours)
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    torch.manual_seed(1)
    ours.blocks[0](hidden_states=x).square().sum().backward()
    torch.manual_seed(1)
    parts = [plain.blocks[0](hidden_states=rows) for rows in x.split(2)]
    torch.cat(parts).square().sum().backward()
    assert close(grads(ours), grads(plain))


# --- blocks that cannot ---------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be_cut_take_the_whole_batch_from_then_on() -> None:
    ours = Scaled()
    engine = chunked(ours)
    x, plain = torch.randn(5, 3, 6, dtype=torch.float64), Scaled()
    scale = torch.randn(3, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"\['scale'\].*whole batches, and block_rows=2"):
        value = ours(x, scale)
    assert torch.equal(value, plain(x, scale)) and engine.row_places is None


def test_outputs_without_rows_are_an_error() -> None:
    class Mean(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states.mean(0)

    ours = nn.Module()
    ours.blocks = nn.ModuleList([Mean()])
    chunked(ours)
    with pytest.raises(ValueError, match="came out of their block .* block_rows=None"):
        ours.blocks[0](HIDDEN)


# --- whole models ---------------------------------------------------------------------------------------------------


def one_by_one(model: Any, examples: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradients of rows that go through the model one after the other."""
    model.zero_grad()
    for row in range(len(examples["input_ids"])):
        model(**{name: tensor[row : row + 1] for name, tensor in examples.items()}, use_cache=False).loss.backward()
    return our_gradients(model)


def compare(model: Any, tolerance: float = 2e-6, **examples: Tensor) -> None:
    """By default to the rounding of float32: products of few tokens sum in another order."""
    model.mebp.loss.normalizer = int((examples["labels"][:, 1:] != -100).sum())
    ours = {name: None if grad is None else grad.clone() for name, grad in step(model, **examples).items()}
    assert model.mebp.engine.row_places is not None
    assert_same(ours, one_by_one(model, examples), tolerance)


ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "mistral",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "granite",
    "phi",
]
PLACES: list[tuple[Any, Any]] = [("file", "file"), ("host", "host"), ("device", "device")]


@pytest.mark.parametrize(("at", "architecture"), list(enumerate([*ARCHITECTURES, "gemma4_text", "qwen3_5_text"])))
def test_equal_to_one_by_one(shared_store: Any, at: int, architecture: str, tmp_path: Any) -> None:
    weights, checkpoints = PLACES[at % 3]
    granularity: Any = "selective" if at % 2 else "full"
    model = loaded(
        shared_store(architecture),
        weights=weights,
        checkpoints=checkpoints,
        scratch_directory=tmp_path,
        recompute_granularity=granularity,
        mlp_chunk_tokens=16 if architecture in ("llama", "gpt2") else None,
        block_rows=2,
    )
    for padding in ("right", "left", None):  # the second recompute leaves out what no gradient needs
        compare(model, **batch(5, 12, padding))


@pytest.mark.parametrize("mode", ["exact", "identity"])
def test_selected_blocks_of_a_model(shared_store: Any, mode: Any) -> None:
    model = loaded(shared_store("llama"), block_rows=2)
    mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode, schedule="random", seed=1)
    compare(model, **batch(3, 12))


def test_packed_rows(shared_store: Any) -> None:
    model = loaded(shared_store("qwen2"), block_rows=2)
    examples = batch(3, 12, None)
    del examples["attention_mask"]
    positions = torch.stack([torch.arange(12) % length for length in (5, 12, 7)])
    compare(model, **examples, position_ids=positions)


def test_a_model_generates_with_its_whole_batch(shared_store: Any) -> None:
    model = loaded(shared_store("llama"), block_rows=1)
    ids = batch(3, 6, None)["input_ids"]
    together = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    model.mebp.engine.block_rows = None
    assert torch.equal(together, model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None))
