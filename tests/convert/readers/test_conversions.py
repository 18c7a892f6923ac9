"""Parameters that transformers makes of other tensors are made here as it makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MIXTURES, save_tiny_model, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mebp_triton.convert.readers import open_source
from mebp_triton.convert.readers.conversions import conversions
from mebp_triton.models.names import current_names
from mebp_triton.models.skeleton import build_skeleton

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 converts nothing")


def bound(directory: Path) -> Any:
    source = open_source(directory)
    source.bind(build_skeleton(source.config, torch.float32))
    return source


@pytest.mark.parametrize("architecture", [*MIXTURES, "olmo_hybrid", "hrm_text"])
def test_every_parameter_is_what_transformers_loads(architecture: str, tmp_path: Path) -> None:
    """``save_pretrained`` takes joined parameters apart again where checkpoints have pieces."""
    save_tiny_model(architecture, tmp_path, num_hidden_layers=3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    source = bound(tmp_path)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(source.read(name), parameter), name


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_a_joined_checkpoint_is_read_as_the_pieces_are(architecture: str, tmp_path: Path) -> None:
    save_tiny_model(architecture, tmp_path / "pieces", num_hidden_layers=1)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "pieces", dtype=torch.float32)
    theirs.config.save_pretrained(tmp_path / "joined")
    save_file(
        {name: parameter.clone() for name, parameter in theirs.named_parameters()},
        tmp_path / "joined" / "model.safetensors",
    )
    pieces, joined = bound(tmp_path / "pieces"), bound(tmp_path / "joined")
    for name in pieces._experts.places:
        assert torch.equal(pieces.read(name), joined.read(name))


@pytest.mark.parametrize("gone", ["one", "gate"])
def test_pieces_that_are_missing(gone: str, tmp_path: Path) -> None:
    save_tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1)
    file = tmp_path / "model.safetensors"
    tensors = {
        name: tensor
        for name, tensor in load_file(file).items()
        if not (name.endswith("5.up_proj.weight") if gone == "one" else name.endswith("gate_proj.weight"))
    }
    assert len(tensors) < len(load_file(file))
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=r"gate_up_proj should have 6 experts and has [06] of .*gate_proj.* and [56] of"
    ):
        bound(tmp_path)


def test_ten_experts_come_in_the_order_of_their_numbers() -> None:
    model = build_skeleton(tiny_config("qwen3_moe", num_experts=12, num_hidden_layers=1), torch.float32)
    keys = [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in reversed(range(12))]
    found = conversions(model, current_names(model, keys))["model.layers.0.mlp.experts.down_proj"]
    assert found.keys == keys[::-1] and found.in_pieces and found.joins_rows()


def test_operations_that_fail_are_one_line() -> None:
    model = build_skeleton(tiny_config("qwen3_moe", num_hidden_layers=1), torch.float32)
    keys = [f"model.layers.0.mlp.experts.0.{name}_proj.weight" for name in ("gate", "up")]
    found = conversions(model, current_names(model, keys))["model.layers.0.mlp.experts.gate_up_proj"]
    patterns = list(found.keys_of(0))
    with pytest.raises(ValueError, match=r"^it cannot be made of .*gate_proj\.weight: [^\n]*$"):
        found.apply({patterns[0]: [torch.ones(2, 3)], patterns[1]: [torch.ones(2, 4)]}, model, "it")
