"""Blocks that are played from graphs: the bits of blocks that run, whatever happens; and faults that must be seen."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from graph_plays import Poisoned, Taped, WatchedBuffers, Wrong, differs, run, same_run, with_graphs
from models import ARCHITECTURES, assert_same, batch, loaded
from stacks import equal_bits, grads
from stages import staged
from torch import Tensor, nn

import mebp_triton as mebp
from mebp_triton.blocks.engine import BlockEngine
from mebp_triton.blocks.graph_players import SameCall
from mebp_triton.blocks.graphs import BlockGraphs

LENGTHS = [batch(2, 10, seed=1), batch(3, 7, "left", seed=2), batch(2, 10, seed=3)]  # of two shapes


@pytest.fixture
def pair(shared_store: Any) -> tuple[Any, Any]:
    return loaded(shared_store("llama")), loaded(shared_store("llama"))


@pytest.fixture(autouse=True)
def no_warning() -> Any:
    """A block that runs without a graph says so, and here none does unless a test catches it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="block_graphs")
        yield


# --- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_over_changing_lengths(shared_store: Any, architecture: str) -> None:
    plain, ours = loaded(shared_store(architecture)), loaded(shared_store(architecture))
    graphs = with_graphs(ours, Taped())
    for at in (0, 1, 2, 1, 0, 1):
        same_run(ours, plain, **LENGTHS[at])
    # A forward and a backward graph for each of 3 blocks and 2 shapes; they are played from the third time on.
    assert graphs.made == 12 and graphs.played == 12


@pytest.mark.parametrize(("weights", "alike"), [("file", True), ("host", False)])
def test_like_blocks_share_the_graphs_of_an_arena(shared_store: Any, weights: Any, alike: bool) -> None:
    """Block 0 has a backward graph of its own, since nobody wants the gradient of its input."""
    config: dict[str, Any] = {"num_hidden_layers": 6}
    if not alike:  # every second block has another kind of attention
        config["layer_types"] = ["sliding_attention", "full_attention"] * 3
    plain, ours = (loaded(shared_store("llama" if alike else "gemma3_text", config=config)) for _ in range(2))
    stager, graphs = staged(ours, weights), with_graphs(ours, Taped())
    for seed in range(4):
        same_run(ours, plain, **batch(seed=seed))
    assert len(stager.arenas) == 2 and graphs.played > 12
    assert graphs.made <= 2 * 2 + 1


@pytest.mark.parametrize(("weights", "checkpoints"), [("device", "host"), ("host", "file"), ("file", "device")])
def test_every_residency(shared_store: Any, weights: Any, checkpoints: Any, tmp_path: Any) -> None:
    options: Any = {"weights": weights, "checkpoints": checkpoints, "scratch_directory": tmp_path}
    plain, ours = (loaded(shared_store("qwen2"), **options) for _ in range(2))
    graphs = with_graphs(ours)
    for seed in range(4):
        same_run(ours, plain, **batch(seed=seed))
    assert graphs.played == 12


@pytest.mark.parametrize("mode", ["full", "exact", "identity", "freeze"])
def test_every_selection_mode(pair: tuple[Any, Any], mode: Any) -> None:
    plain, ours = pair
    graphs = with_graphs(ours)
    managers = [mebp.LayerCyclicManager(model, ratio=1 / 3, mode=mode, seed=0) for model in (plain, ours)]
    for seed in range(9):
        same_run(ours, plain, **batch(1, 6, None, seed))
        for manager in managers:
            manager.advance()
    assert graphs.played


def test_gradients_are_added_up_outside(pair: tuple[Any, Any]) -> None:
    """As micro-batches do; every gradient has memory of its own, which the next play does not write to."""
    plain, ours = pair
    with_graphs(ours)
    for _ in range(3):
        for examples in LENGTHS:
            for model in pair:
                model(**examples).loss.backward()
        kept = [[p.grad.clone() for p in model.parameters() if p.requires_grad] for model in pair]
        assert all(map(torch.equal, *kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_optimizer_reaches_the_graphs(shared_store: Any, dtype: torch.dtype) -> None:
    """Also one that writes to ``.data``, which leaves no trace."""
    plain, ours = (loaded(shared_store("qwen2"), dtype=dtype) for _ in range(2))
    graphs = with_graphs(ours, Taped())
    for step in range(5):
        same_run(ours, plain, **LENGTHS[0])
        for model in (plain, ours):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(parameter.grad, alpha=-0.1 * (step + 1))
    assert graphs.played == 18


def test_gradients_off_in_both_modes(pair: tuple[Any, Any]) -> None:
    """Steps and evaluations in turns, and a change of the parameters between two evaluations, as MeZO makes them."""
    plain, ours = pair
    graphs = with_graphs(ours, Taped())
    for change in range(4):
        for model in (plain.train(), ours.train()):
            for parameter in model.parameters():
                parameter.data.add_(0.01 * change) if parameter.requires_grad else None
        same_run(ours, plain, **LENGTHS[0])
        with torch.no_grad():
            found, expected = (model.eval()(**LENGTHS[0], use_cache=False).loss for model in pair[::-1])
        assert torch.equal(found, expected)
    assert graphs.played == 18 and graphs.made == 9, "of 3 blocks: forward and backward to train, forward to evaluate"


def test_gradients_off_and_chunks_of_rows(shared_store: Any) -> None:
    """As MeZO takes micro-batches that are joined: 5 rows in chunks of 2, so the last has a shape of its own."""
    plain, ours = (loaded(shared_store("llama"), block_rows=2) for _ in range(2))
    graphs = with_graphs(ours, Taped())
    for seed in range(4):
        with torch.no_grad():
            found, expected = (model(**batch(5, 6, "right", seed), use_cache=False).loss for model in (ours, plain))
        assert torch.equal(found, expected)
    assert graphs.made == 6 and graphs.played > 12, "of 3 blocks: chunks of two rows and of one"


def test_gradients_off_where_no_graph_is_played(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    graphs = with_graphs(ours)
    ids = LENGTHS[0]["input_ids"]
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(ours(ids, use_cache=True).logits, plain(ids, use_cache=True).logits)
        with torch.inference_mode():
            assert torch.equal(ours(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    assert graphs.made == 0
    for _ in range(3):
        same_run(ours, plain, **LENGTHS[0])


def test_autocast(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    graphs = with_graphs(ours)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            same_run(ours, plain, **LENGTHS[0])
        same_run(ours, plain, **LENGTHS[0])
    assert graphs.made == 12 and graphs.played == 24


def test_chunks_of_an_mlp(shared_store: Any) -> None:
    plain, ours = (loaded(shared_store("llama"), mlp_chunk_tokens=7).train() for _ in range(2))
    graphs = with_graphs(ours)
    for seed in range(4):
        same_run(ours, plain, **batch(seed=seed))
    assert graphs.played == 12


@pytest.mark.parametrize("ratio", [1, 1 / 3])
def test_chunks_of_rows(shared_store: Any, ratio: float) -> None:
    """5 rows in chunks of 2, so the last chunk has a shape of its own; blocks below the selected one as well."""
    models = [loaded(shared_store("llama"), block_rows=2) for _ in range(2)]
    plain, ours = models
    graphs = with_graphs(ours)
    managers = [mebp.LayerCyclicManager(model, ratio=ratio, mode="exact") for model in models]
    for seed in range(4):
        same_run(ours, plain, **batch(5, 6, "right", seed))
        for manager in managers:
            manager.advance()
    assert graphs.played


def test_a_copy_of_the_model_has_graphs_of_its_own(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    first = with_graphs(ours)
    for _ in range(3):
        run(ours, **LENGTHS[0])
    twin = copy.deepcopy(ours)
    for _ in range(4):
        same_run(twin, plain, **LENGTHS[0])
    assert first.made == twin.mebp.engine.graphs.made == 6 and first.played == 6


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["device", "host"])
def test_a_play_reads_static_buffers_alone(pair: tuple[Any, Any], weights: Any) -> None:
    plain, ours = pair
    if weights == "host":
        staged(ours, weights)
    buffers = WatchedBuffers()
    player = Poisoned(buffers)
    graphs = with_graphs(ours, player, buffers=buffers)
    for seed in range(4):
        same_run(ours, plain, **batch(seed=seed))
    assert graphs.played and player.poisoned > 20 * graphs.played


@pytest.mark.parametrize("role", ["argument", "gradient", "state"])
def test_a_stale_buffer_is_seen(pair: tuple[Any, Any], role: str) -> None:
    """A block's input, the gradient of its output, or its adapter is not copied in: the comparison must fail."""
    plain, ours = pair
    graphs = with_graphs(ours, buffers=WatchedBuffers(stale=role), prove=False)
    found = [differs(ours, plain, **batch(seed=seed)) for seed in range(4)]
    assert graphs.played == 18 and found[-1]


def test_a_wrong_arena_is_seen(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    staged(ours, "host")
    with_graphs(ours, prove=False, addresses=lambda live: (1,) * len(live.addresses()))
    assert any([differs(ours, plain, **batch(seed=seed)) for seed in range(4)])


def test_a_graph_that_gives_other_bits_is_shared_no_longer(pair: tuple[Any, Any]) -> None:
    """The same wrong arena; the blocks get graphs of their own."""
    plain, ours = pair
    staged(ours, "host")
    graphs = with_graphs(ours, addresses=lambda live: (1,) * len(live.addresses()))
    for seed in range(6):
        same_run(ours, plain, **batch(seed=seed))
    assert graphs.made > 4 and graphs.played


def test_a_graph_that_gives_other_bits_is_not_used(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    graphs = with_graphs(ours, Wrong())
    with pytest.warns(UserWarning, match="a graph of block [012] gives other numbers than the block"):
        for seed in range(6):
            same_run(ours, plain, **batch(seed=seed))
    assert graphs.made and not graphs.played


# --- when a graph is made --------------------------------------------------------------------------------------------


def steps(model: Any, count: int = 2, **examples: Any) -> None:
    for _ in range(count):
        run(model, **examples)


def change_dtype(model: Any) -> None:
    for parameter in model.mebp.engine.blocks[0].parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def freeze(model: Any) -> None:
    next(p for p in model.mebp.engine.blocks[0].parameters() if p.requires_grad).requires_grad_(False)


def other_weights(model: Any) -> None:
    layer = model.mebp.engine.blocks[0].mlp.down_proj
    layer.set_int4(layer.int4().to("cpu", copy=True))


def other_scaling(model: Any) -> None:
    model.mebp.engine.blocks[0].mlp.down_proj.scaling = 0.5


def other_attention(model: Any) -> None:
    model.config._attn_implementation = "eager"


CHANGES = [(change_dtype, 2), (freeze, 1), (other_weights, 2), (other_scaling, 2), (other_attention, 6)]


@pytest.mark.parametrize(("change", "more"), CHANGES)
def test_a_graph_is_made_anew(pair: tuple[Any, Any], change: Any, more: int) -> None:
    plain, ours = pair
    graphs = with_graphs(ours)
    steps(ours, **LENGTHS[0])
    assert graphs.made == 6
    for model in pair:
        change(model)
    for _ in range(3):
        same_run(ours, plain, **LENGTHS[0])
    assert graphs.made == 6 + more


def test_settings_by_which_torch_chooses_kernels(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    graphs = with_graphs(ours)
    steps(ours, **LENGTHS[0])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for _ in range(3):
            same_run(ours, plain, **LENGTHS[0])
    assert graphs.made == 12


def test_a_new_parameter_needs_no_new_graph(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    graphs = with_graphs(ours)
    steps(ours, **LENGTHS[0])
    for model in pair:
        layer = model.mebp.engine.blocks[0].mlp.down_proj
        layer.lora_A = nn.Parameter(layer.lora_A.detach() * 2)
    same_run(ours, plain, **LENGTHS[0])
    assert graphs.made == 6 and graphs.played == 6


def test_the_least_recently_used_graph_is_dropped(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    graphs = with_graphs(ours, limit=4)  # 2 shapes, forward and backward
    short, middle, long = (batch(1, length, None) for length in (5, 8, 11))
    for examples in (short, middle):
        steps(ours, **examples)
    steps(ours, 1, **short)
    assert graphs.made == 12 and graphs.played == 6
    small = graphs.buffers.nbytes()
    steps(ours, **long)  # in the place of middle
    assert graphs.made == 18 and graphs.buffers.nbytes() < 1.3 * small
    graphs.played = 0
    steps(ours, 1, **short)
    assert graphs.played == 6
    steps(ours, **middle)
    assert graphs.made == 24


def test_graphs_of_eight_widths_are_kept() -> None:
    """As many as a run has. The first block, whose input needs no gradient, has a third graph for each width."""
    _, ours, graphs = rows([Takes(0) for _ in range(3)])
    for _ in range(3):
        for width in range(1, 9):
            ours(torch.ones(width, 6)).backward()
    assert graphs.made == 3 * 8
    graphs.played = 0
    for width in range(1, 9):
        ours(torch.ones(width, 6)).backward()
    assert graphs.made == 3 * 8 and graphs.played == 6 * 8


def test_widths_of_many_blocks_are_remembered() -> None:
    """Each block has graphs of its own here, as where weights are resident."""
    _, ours, graphs = rows([Named(str(index)) for index in range(20)])
    for _ in range(2):
        for width in range(1, 9):
            ours(torch.ones(width, 6)).backward()
    assert graphs.made == 2 * 20 * 8


def test_weights_that_keep_moving_keep_no_memory(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    graphs = with_graphs(ours)
    for _ in range(10):
        other_weights(ours)
        run(ours, **LENGTHS[0])
    assert len(graphs._kinds) <= 12
    assert graphs.made == 4, "those of the two other blocks are kept"


# --- what runs without a graph ---------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A block whose number matters, as that of GPT-2 may."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.up = layer_idx, nn.Linear(6, 6)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.up(hidden_states) / (self.layer_idx + 1)


class Odd(Scaled):
    """A block that does what ``how`` says."""

    def __init__(self, layer_idx: int, how: str) -> None:
        super().__init__(layer_idx)
        self.how, self.calls, self.log = how, 0, [0]
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, hidden_states: Tensor) -> Any:
        out = super().forward(hidden_states)
        if self.how == "draws":
            return out + torch.rand(6)
        if self.how == "waits":
            return out * (1 if float(out.detach().sum()) > 0 else 2)
        if self.how == "index":
            return out + hidden_states[hidden_states > 0].sum()
        if self.how == "counts":
            self.calls += 1
        if self.how == "appends":
            self.log.append(len(self.log))
        if self.how == "writes":
            self.seen.add_(1)
        if self.how == "strange":
            return out, object()
        return out


class Takes(Scaled):
    """A block that takes any argument."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return super().forward(hidden_states)


class Named(Takes):
    """A block that is like no other, since it has a name of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(0)
        self.name = name


class Row(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, **kwargs)
            x = x[0] if isinstance(x, tuple) else x
        return x.square().sum()


def rows(blocks: list[nn.Module]) -> tuple[Row, Row, BlockGraphs]:
    plain = Row(blocks)
    ours = copy.deepcopy(plain)
    engine = BlockEngine(ours.blocks)
    engine.graphs = BlockGraphs(engine.blocks, SameCall())
    return plain, ours, engine.graphs


def assert_equal_steps(plain: Row, ours: Row, steps: int) -> None:
    """Takes steps with both models; their gradients must be the same to the bit after each."""
    for _ in range(steps):
        x = torch.randn(3, 6)
        for model in (plain, ours):
            model.zero_grad()
            model(x).backward()
        assert equal_bits(grads(ours), grads(plain))


def test_blocks_whose_number_matters_share_no_graph() -> None:
    torch.manual_seed(0)
    plain, ours, graphs = rows([Scaled(index) for index in range(4)])
    assert_equal_steps(plain, ours, 6)
    assert graphs.played > 20


class FourthIsOther(Scaled):
    """A block whose number matters in one place alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.up(hidden_states) * (2 if self.layer_idx == 3 else 1)


def test_a_graph_that_is_right_for_some_blocks_is_not_used_for_another() -> None:
    torch.manual_seed(0)
    plain, ours, graphs = rows([FourthIsOther(index) for index in range(4)])
    assert_equal_steps(plain, ours, 4)
    assert graphs.played


REASONS = {
    "draws": "it draws random numbers",
    "waits": "it calls local_scalar_dense, after which the host waits",
    "index": "it calls (index|nonzero|masked_select), after which the host waits",
    "counts": "it keeps something in an attribute of a module",
    "appends": "it keeps something in an attribute of a module",
    "writes": "it changes an argument, a parameter or a buffer in place",
    "strange": "it returns a object",
}


@pytest.mark.parametrize(("how", "reason"), REASONS.items())
def test_what_cannot_be_recorded_runs_as_usual_and_says_why(how: str, reason: str) -> None:
    torch.manual_seed(0)
    plain, ours, graphs = rows([Odd(index, how) for index in range(2)])
    with pytest.warns(UserWarning, match=f"runs without a graph, since {reason}") as said:
        for seed in range(3):
            results = []
            for model in (plain, ours):
                torch.manual_seed(seed)
                model.zero_grad()
                model(torch.ones(3, 6)).backward()
                results.append((grads(model), torch.rand(1)))
            assert equal_bits(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert len([warning for warning in said if "block_graphs" in str(warning.message)]) == 1
    assert not graphs.made


@pytest.mark.parametrize(
    ("argument", "reason"),
    [({"scratch": {}}, "an argument is a dict"), ({"thing": object()}, "an argument is a object")],
)
def test_arguments_that_no_buffer_holds(argument: dict[str, Any], reason: str) -> None:
    _, ours, graphs = rows([Takes(0), Takes(1)])
    with pytest.warns(UserWarning, match=reason):
        for _ in range(3):
            ours(torch.ones(3, 6), **argument).backward()
    assert not graphs.made


def test_hooks_inside_of_a_block(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    graphs, called = with_graphs(ours), []
    ours.mebp.engine.blocks[1].mlp.register_forward_hook(lambda *_: called.append(1))
    ours.mebp.engine.blocks[0].register_forward_hook(lambda *_: called.append(0))  # around the block, not inside
    with pytest.warns(UserWarning, match="a module inside of it has hooks"):
        for seed in range(3):
            same_run(ours, plain, **batch(seed=seed))
    assert called.count(0) == 3 and called.count(1) == 6 and graphs.made == 4


def test_hooks_that_are_gone_again() -> None:
    _, ours, graphs = rows([Scaled(0), Scaled(1)])
    handle = ours.blocks[0].up.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="a module inside of it has hooks"):
        ours(torch.ones(3, 6)).backward()
    handle.remove()
    for _ in range(4):
        ours(torch.ones(3, 6)).backward()
    assert graphs.made == 4 and graphs.played >= 4


def test_a_tensor_on_another_device() -> None:
    """A graph would not copy it, but keep the value that it had when the graph was recorded."""

    class Elsewhere(SameCall):
        device = torch.device("cuda", 1)

    _, ours, graphs = rows([Takes(0), Takes(1)])
    with pytest.warns(UserWarning, match="a tensor that it reads is on meta, and graphs are recorded on cpu"):
        for _ in range(3):
            ours(torch.ones(3, 6), thing=torch.ones(2, device="meta")).backward()
    graphs.player = Elsewhere()
    with pytest.warns(UserWarning, match="is on cpu, and graphs are recorded on cuda:1"):
        for _ in range(3):
            ours(torch.ones(3, 6)).backward()
    assert not graphs.made


def test_containers_that_blocks_share(shared_store: Any) -> None:
    plain, ours = loaded(shared_store("gemma3n_text")), loaded(shared_store("gemma3n_text"))
    with_graphs(ours)
    with pytest.warns(UserWarning, match="runs without a graph, since an argument is a (KVSharingDict|UserDict)"):
        for seed in range(3):
            results = [run(model, **batch(1, 6, None, seed)) for model in (plain, ours)]
            assert torch.equal(results[0][0], results[1][0])
            assert equal_bits(*(list(gradients.values()) for _, gradients in results))


def test_hooks_on_all_modules(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    graphs, called = with_graphs(ours), []
    steps(ours, **LENGTHS[0])
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        with pytest.warns(UserWarning, match="there are hooks on all modules"):
            run(ours, **LENGTHS[0])
    finally:
        handle.remove()
    assert ours.mebp.engine.blocks[1].mlp in called and not graphs.played
    same_run(ours, plain, **LENGTHS[0])
    assert graphs.played == 6


def test_an_engine_that_is_removed_gives_graphs_back(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    graphs = weakref.ref(with_graphs(ours))
    steps(ours, **LENGTHS[0])
    ours.mebp.engine.remove()
    gc.collect()
    assert graphs() is None


@pytest.mark.parametrize("hooked", [False, True])
def test_no_tensor_of_a_call_is_kept(hooked: bool) -> None:
    """Neither by a graph nor where a block cannot be copied."""
    _, ours, graphs = rows([Scaled(0), Scaled(1)])
    if hooked:
        ours.blocks[1].up.register_forward_hook(lambda *_: None)
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            x = torch.ones(3, 6, requires_grad=True)
            between = ours.blocks[0](x)
            ours.blocks[1](between).sum().backward()
            kept += [weakref.ref(x), weakref.ref(between)]
            del x, between
    gc.collect()
    assert graphs.played and not any(ref() is not None for ref in kept)


def test_dropout(shared_store: Any) -> None:
    plain, ours = (loaded(shared_store("llama"), {"lora_dropout": 0.3}).train() for _ in range(2))
    graphs = with_graphs(ours)
    with pytest.warns(UserWarning, match="it draws random numbers, as dropout above 0 does"):
        for seed in range(3):
            results = []
            for model in (plain, ours):
                torch.manual_seed(seed)
                results.append(run(model))
            assert torch.equal(results[0][0], results[1][0])
            assert_same(results[1][1], results[0][1])
    assert not graphs.made
    for _ in range(3):
        same_run(ours.eval(), plain.eval())
    assert graphs.played == 6
