"""What is found out about a model by running it without data: layers with one input, MLPs that can run by chunks."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, COMPOSITE, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import mebp_triton as mebp
from mebp_triton.blocks.mlp_chunks import ChunkedMLP
from mebp_triton.blocks.runner import find_blocks
from mebp_triton.models import discover
from mebp_triton.models.discover import find_mlps, install_mlp_chunks, join_shared_inputs, shared_inputs
from mebp_triton.models.skeleton import int4_sites, linear_names


def refuse(_: Any) -> Any:
    raise ValueError("Odd does not run on the meta device: no kernel")


# --- layers with one input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_with_one_input(architecture: str) -> None:
    groups = shared_inputs(tiny_config(architecture))
    names = [site.name for sites in groups for site in sites]
    assert len(set(names)) == len(names)
    ends = {tuple(site.name.rpartition(".")[2] for site in sites) for sites in groups}
    if architecture in ("llama", "qwen2", "gemma3_text", "mistral"):
        assert ends == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}


def test_the_config_is_left_as_it_was() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    shared_inputs(config)
    assert config.to_dict() == before


def test_adapted_layers_are_joined_and_others_are_not(shared_store: Any) -> None:
    model = mebp.load(shared_store("llama"), mebp.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert attention.q_proj.shared_input.layers == (attention.q_proj, attention.v_proj)
    assert attention.v_proj.shared_input is attention.q_proj.shared_input
    assert mlp.up_proj.shared_input is None, "it is alone"


def test_a_model_that_cannot_run_without_data_is_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover, "run_on_meta", refuse)
    with pytest.warns(UserWarning, match="Odd does not run .* one by one"):
        join_shared_inputs(nn.Linear(2, 2), tiny_config("llama"))


# --- MLPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlps(architecture: str) -> None:
    config = tiny_config(architecture)
    with torch.device("meta"):
        blocks, stack = find_blocks(AutoModelForCausalLM.from_config(config))
    expected = [] if architecture == "opt" else [f"{blocks}.{index}.mlp" for index in range(len(stack))]
    assert find_mlps(config, blocks) == expected


class Odd(nn.Module):
    """An MLP's name, two linear layers, and what else the test puts in."""

    def __init__(self, extra: nn.Module | None = None, two: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.two = nn.Linear(48, 80), nn.Linear(80, 48), two
        self.extra = extra

    def forward(self, x: torch.Tensor, more: Any = None) -> Any:
        y = self.down(torch.relu(self.up(x)))
        return (y, y) if self.two else y


class Model(nn.Module):
    """One block, whose MLP is called with ``arguments`` beside its input."""

    def __init__(self, mlp: nn.Module, *arguments: Any) -> None:
        super().__init__()
        block = nn.Module()
        block.mlp = copy.deepcopy(mlp)
        self.blocks, self.arguments = nn.ModuleList([block]), arguments

    def forward(self, **_: Any) -> Any:
        return self.blocks[0].mlp(torch.zeros(1, 2, 48, device="meta"), *self.arguments)


@pytest.mark.parametrize(
    ("model", "chunkable"),
    [
        (Model(Odd()), True),
        (Model(Odd(nn.Dropout(0.1))), True),
        (Model(Odd(nn.LayerNorm(48))), False),
        (Model(Odd(nn.ModuleList([nn.Linear(48, 48)]))), False),
        (Model(Odd(nn.MultiheadAttention(48, 2))), False),
        (Model(Odd(two=True)), False),
        (Model(Odd(), "more"), False),
        (Model(nn.Sequential(nn.Linear(48, 24))), False),
        (Model(nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 24))), False),
    ],
    ids=["mlp", "dropout", "norm", "experts", "attention", "a tuple", "more arguments", "one layer", "another width"],
)
def test_what_counts_as_an_mlp(monkeypatch: pytest.MonkeyPatch, model: nn.Module, chunkable: bool) -> None:
    monkeypatch.setattr(discover, "meta_model", lambda config: model.to("meta"))
    assert find_mlps(None, "blocks") == (["blocks.0.mlp"] if chunkable else [])


def chunked(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ChunkedMLP)]


@pytest.mark.parametrize(("tokens", "expected"), [(7, 3), (0, 0), (None, 0)])
def test_a_model_is_loaded_with_its_mlps_by_chunks(shared_store: Any, tokens: Any, expected: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*chunks")
        model = mebp.load(shared_store("llama"), mlp_chunk_tokens=tokens)
    assert chunked(model) == [f"model.layers.{index}.mlp" for index in range(expected)]


def test_blocks_without_an_mlp_of_their_own_are_left_whole(shared_store: Any) -> None:
    """OPT has its two layers in the block itself."""
    with pytest.warns(UserWarning, match="3 of 3 blocks of OPTForCausalLM have no MLP that can run by chunks") as seen:
        model = mebp.load(shared_store("opt"), mlp_chunk_tokens=7)
    assert len([warning for warning in seen if "chunks" in str(warning.message)]) == 1
    assert not chunked(model)


def test_a_model_that_cannot_run_without_data_runs_whole(monkeypatch: pytest.MonkeyPatch, shared_store: Any) -> None:
    model = mebp.load(shared_store("llama"))
    monkeypatch.setattr(discover, "run_on_meta", refuse)
    with pytest.warns(UserWarning, match="Odd does not run .* mlp_chunk_tokens=7 changes nothing"):
        install_mlp_chunks(model, model.model.layers, 7)
    assert not chunked(model)


@pytest.mark.parametrize("tokens", [-1, 2.0, "16", True])
def test_a_number_of_tokens_that_is_none(tokens: Any) -> None:
    with pytest.raises(ValueError, match="mlp_chunk_tokens must be a whole number of tokens, or 0 for whole MLPs, got"):
        install_mlp_chunks(None, nn.ModuleList(), tokens)


@pytest.mark.parametrize("runs", [True, False])
def test_layers_that_text_never_reaches(runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the code cannot be run, all that lies beside the decoder of a larger model counts."""
    kind, text, vision = COMPOSITE["gemma3"]
    composite = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    projected = tiny_config("opt", word_embed_proj_dim=32)
    if not runs:

        def fails(model: Any) -> None:
            raise ValueError("it does not run")

        monkeypatch.setattr(discover, "run_on_meta", fails)
    for config, tower in ((composite, "model.vision_tower."), (projected, None), (tiny_config("llama"), None)):
        model = discover.meta_model(config)
        linear = linear_names(int4_sites(model)[0])
        wanted = {name for name in linear if tower is not None and name.startswith(tower)}
        assert discover.unreached_by_text(config, find_blocks(model)[0], linear) == wanted
        assert bool(wanted) == (config is composite)


def test_a_decoder_alone_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes no longer where there is nothing to find."""
    monkeypatch.setattr(discover, "meta_model", lambda config: pytest.fail("it was built"))
    assert (
        discover.unreached_by_text(tiny_config("llama"), "model.layers", ["model.layers.0.mlp.up_proj"]) == frozenset()
    )
