"""What an expert's matrices read is what transformers' own experts hand them."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import tiny_config
from transformers import AutoModelForCausalLM

from mebp_triton.convert.calibration.expert_inputs import expert_inputs
from mebp_triton.models.experts import fused_experts

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules in transformers 4")


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_the_matrices_make_of_it_what_the_experts_give(architecture: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.float32).requires_grad_(False)
    experts = fused_experts(model)[0]
    module = model.get_submodule(experts.path)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):  # zero in a new model
            parameter.normal_()
    width = experts.shapes["down_proj"][0]
    hidden, index, weights = (
        torch.randn(5, width),
        torch.tensor([[0, 2], [2, 3], [3, 2], [0, 3], [2, 0]]),
        torch.rand(5, 2),
    )
    found = dict(expert_inputs(module, experts, hidden, index))
    assert list(found) == [experts.matrix(expert, name) for expert in (0, 2, 3) for name in experts.shapes]
    made = torch.zeros(5, width)
    for expert in (0, 2, 3):
        tokens, choices = (index == expert).nonzero().unbind(1)
        assert torch.equal(found[experts.matrix(expert, next(iter(experts.shapes)))], hidden[tokens])
        down = module.down_proj[expert]
        y = found[experts.matrix(expert, "down_proj")] @ (down if experts.transposed else down.t())
        y = y + module.down_proj_bias[expert] if experts.transposed else y
        made.index_add_(0, tokens, y * weights[tokens, choices, None])
    torch.testing.assert_close(made, module(hidden, index, weights))
