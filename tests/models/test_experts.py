"""Which modules have experts that become int4, found by what their class says of itself."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import MIXTURES, tiny_config

from mebp_triton.models.experts import FusedExperts, expert_places, fused_experts
from mebp_triton.models.skeleton import build_skeleton, float_names, int4_sites

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules, or of older forms")


@pytest.mark.parametrize("architecture", MIXTURES)
def test_every_matrix_of_every_expert_is_a_site(architecture: str) -> None:
    """No parameter of experts but their biases stays float, and each site is a slice of one."""
    model = build_skeleton(tiny_config(architecture), torch.float32)
    sites = [site for site in int4_sites(model)[0] if site.role == "expert"]
    found = fused_experts(model)
    assert found and len(sites) == sum(experts.count * len(experts.shapes) for experts in found)
    assert len({site.name for site in sites}) == len(sites)
    for site in sites:
        _, *slice_shape = model.get_parameter(site.parameter).shape
        shape = site.out_features, site.in_features
        assert slice_shape == list(shape[::-1] if site.transposed else shape)
    floats = [name for name in float_names(model, int4_sites(model)[0]) if ".experts." in name]
    assert all(name.endswith("_bias") for name in floats)
    assert {f"{site.name}.weight" for site in sites} == expert_places(model).keys()


def test_gpt_oss_keeps_its_matrices_turned() -> None:
    model = build_skeleton(tiny_config("gpt_oss"), torch.float32)
    path = "model.layers.0.mlp.experts"
    assert fused_experts(model)[0] == FusedExperts(
        path, 4, {"gate_up_proj": (128, 64), "down_proj": (64, 64)}, transposed=True
    )
    assert expert_places(model)[f"{path}.3.down_proj.weight"] == (f"{path}.down_proj", 3)


@pytest.mark.parametrize("change", ["flag", "parameter", "shape", "count", "bias"])
def test_what_does_not_follow_the_interface_is_not_found(change: str) -> None:
    model = build_skeleton(tiny_config("mixtral", num_hidden_layers=1), torch.float32)
    experts = model.model.layers[0].mlp.experts
    assert fused_experts(model)
    if change == "flag":
        del experts.is_concatenated
    elif change == "parameter":
        experts.more = torch.nn.Parameter(torch.empty(4, 3, 3))
    elif change == "shape":
        experts.down_proj = torch.nn.Parameter(torch.empty(4, 3))
    elif change == "count":
        experts.num_experts = 5
    else:
        experts.has_bias = True
    assert not fused_experts(model)


def test_experts_that_a_store_has_in_float_stay_so() -> None:
    """Stores that were made before experts became int4."""

    class Older:
        matrices = ()
        floats = {
            f"model.layers.{index}.mlp.experts.{name}" for index in range(3) for name in ("gate_up_proj", "down_proj")
        }

    model = build_skeleton(tiny_config("mixtral"), torch.float32)
    assert all(site.role != "expert" for site in int4_sites(model, Older())[0])
