"""Parameters come as float32 in the model's own shape, and go; of tables only the rows that are read."""

import pytest
import torch
from models import save_tiny_model
from source_runs import opened_source, whole_model
from torch import nn

from mebp_triton.convert.calibration.source_weights import SourceWeights, keep_rows
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import build_skeleton


def weights_of(root, architecture):
    source = opened_source(save_tiny_model(architecture, root / "model"))
    return SourceWeights(source, build_skeleton(source.config, torch.float32))


def test_a_block_comes_and_goes(tmp_path):
    weights, truth = weights_of(tmp_path, "gpt2"), dict(whole_model(tmp_path).named_parameters())
    weights.load("transformer.h.1.")
    for name, parameter in weights.model.named_parameters():
        if name.startswith("transformer.h.1."):
            assert torch.equal(parameter, truth[name]) and not parameter.requires_grad
        else:
            assert parameter.device.type == "meta"
    weights.unload("transformer.h.1.")
    left = dict(weights.model.named_parameters())
    assert all(parameter.device.type == "meta" for parameter in left.values())
    assert {name: value.shape for name, value in left.items()} == {name: value.shape for name, value in truth.items()}


@pytest.mark.parametrize("architecture, name", [("gpt2", "transformer.h.0.mlp.c_fc"), ("llama", "lm_head")])
def test_codes_take_the_place_of_a_weight_in_its_own_shape(architecture, name, tmp_path):
    """The weight of a ``Conv1D`` is the other way round; a tied head goes by its first name."""
    weights = weights_of(tmp_path, architecture)
    exact = weights.read(f"{name}.weight")
    transposed = architecture == "gpt2"
    weight, _ = quantize_matrix(exact.t().contiguous() if transposed else exact, group_size=32)
    weights.put(f"{name}.weight", weight)
    value = weights.model.get_parameter(f"{name}.weight")
    assert value.shape == exact.shape
    assert torch.equal(value.t() if transposed else value, decode(weight, torch.float32))


def test_what_lies_outside_of_the_blocks_is_there_but_for_the_head(tmp_path):
    weights, truth = weights_of(tmp_path, "qwen2"), dict(whole_model(tmp_path).named_parameters())
    weights.load_rest("model.layers", (), torch.tensor([[4, 9, 4]]))
    there = {name for name, value in weights.model.named_parameters() if value.device.type != "meta"}
    assert there == {"model.embed_tokens.weight", "model.norm.weight"}
    assert torch.equal(weights.model.model.norm.weight, truth["model.norm.weight"])
    assert torch.equal(weights.model.model.embed_tokens.weight, truth["model.embed_tokens.weight"][[0, 4, 9]])


def test_what_is_not_needed_stays_away(tmp_path):
    weights = weights_of(tmp_path, "qwen2")
    weights.load_rest("model.layers", {"model.norm"}, torch.tensor([4]))
    assert weights.model.model.norm.weight.device.type == "meta"


def test_a_damaged_parameter_is_named(tmp_path):
    weights = weights_of(tmp_path, "llama")
    read = weights.source.read
    weights.source.read = lambda name: read(name) * float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.\S+ of the source is damaged"):
        weights.load("model.layers.0.")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight of the source is damaged"):
        weights.load_rest("model.layers", (), torch.tensor([1]))


@pytest.mark.parametrize("coded", [False, True])
def test_rows_that_are_kept_are_those_of_the_table(coded):
    table, ids = torch.randn(50, 64), torch.tensor([[7, 49], [7, 3]])
    module = nn.Embedding(50, 64, padding_idx=49)
    stored = quantize_matrix(table, group_size=32)[0] if coded else table
    keep_rows(module, stored, ids)
    assert module.weight.shape == (4, 64)
    expected = decode(stored, torch.float32) if coded else table
    assert torch.equal(module(ids), expected[ids])
    assert torch.equal(module(torch.tensor([0])), expected[:1])
