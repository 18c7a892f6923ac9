"""Int4 experts give what transformers' own experts give on the decoded weights: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from interpreted import triton_kernels  # noqa: F401 - a fixture
from models import relative_rms, tiny_config
from transformers import AutoModelForCausalLM

from mebp_triton.autotune.expert_cases import in_one_storage
from mebp_triton.kernels import expert_products
from mebp_triton.kernels.accuracy import random_weight
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.experts import Int4Experts, replace_experts
from mebp_triton.models.experts import fused_experts

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules, or of older forms")


class Held:
    """Weights that are always there; notes which experts were asked for."""

    def __init__(self, weights: list[tuple[Int4Weight, Int4Weight]]) -> None:
        self.weights, self.asked = weights, list[list[int]]()

    def bring(self, experts: Any) -> list[tuple[Int4Weight, Int4Weight]]:
        self.asked.append(list(experts))
        return [self.weights[expert] for expert in experts]


def pair(architecture: str) -> tuple[Any, Int4Experts, Held]:
    """transformers' experts of a tiny model, and ours with the same weights."""
    size = {"num_hidden_layers": 1, "layer_types": None}
    found: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        config = tiny_config(architecture, **(size if architecture in ("gpt_oss",) else {"num_hidden_layers": 1}))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
        found.append(next(iter(fused_experts(model))))
        found.append(model.get_submodule(found[-1].path))
    experts, theirs, _, ours = found
    cpu = torch.device("cpu")
    weights = [
        tuple(random_weight(*shape, cpu, "symmetric", 32) for shape in experts.shapes.values())
        for _ in range(experts.count)
    ]
    for place, name in enumerate(experts.shapes):
        for expert in range(experts.count):
            value = decode(weights[expert][place], torch.float32)
            getattr(theirs, name)[expert] = value.t() if experts.transposed else value
    for module in (theirs, ours):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                torch.manual_seed(1)
                parameter.normal_()
    held = Held(weights)  # type: ignore[arg-type]
    return theirs, replace_experts(ours, next(iter(experts.shapes)), held, "panel"), held


def routed(tokens: int, experts: int, per_token: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, the experts of each token, and their weights."""
    hidden = torch.randn(tokens, width, requires_grad=True)
    scores, index = torch.rand(tokens, experts).topk(per_token)
    return hidden, index, scores.detach().requires_grad_()


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("tokens", [1, 13])
def test_outputs_and_gradients(architecture: str, tokens: int) -> None:
    theirs, ours, held = pair(architecture)
    width = theirs.down_proj.shape[-1 if theirs.is_transposed else 1]
    hidden, index, scores = routed(tokens, theirs.num_experts, 2, width)
    results = []
    for module in (ours, theirs):
        hidden.grad = scores.grad = None
        output = module(hidden, index, scores)
        output.square().sum().backward()
        results.append((output.detach(), hidden.grad, scores.grad))
    assert all(relative_rms(one, other) < 1e-5 for one, other in zip(*results, strict=True))
    assert held.asked == [sorted(set(index.flatten().tolist()))]


def test_a_token_counts_each_of_its_experts_and_nothing_comes_of_no_tokens() -> None:
    """Twice the same expert is allowed, as a router may say it; its result is added twice."""
    theirs, ours, _ = pair("mixtral")
    hidden = torch.randn(3, 48)
    index, scores = torch.tensor([[1, 1], [0, 1], [3, 3]]), torch.ones(3, 2)
    assert relative_rms(ours(hidden, index, scores), theirs(hidden, index, scores)) < 1e-5
    empty = ours(hidden[:0], index[:0], scores[:0])
    assert empty.shape == (0, 48)


def test_a_norm_after_the_experts_comes_before_their_weights() -> None:
    _, ours, _ = pair("mixtral")
    hidden, index, scores = routed(5, 4, 1, 48)
    ours.has_post_expert_norm = True
    ours.post_expert_norm = lambda y: y / y.norm(dim=1, keepdim=True)
    assert relative_rms(ours(hidden, index, scores).norm(dim=1), scores[:, 0]) < 1e-5


def test_results_do_not_change_from_run_to_run_and_have_the_dtype_of_the_input() -> None:
    _, ours, _ = pair("mixtral")
    hidden, index, scores = routed(40, 4, 2, 48)
    low = hidden.detach().bfloat16()
    first, second = ours(low, index, scores), ours(low, index, scores)
    assert first.dtype == torch.bfloat16 and torch.equal(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_rms(ours(hidden, index, scores).float(), first.float()) < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted beside a GPU")
@pytest.mark.usefixtures("triton_kernels")
def test_one_launch_for_all_chosen_experts_gives_what_panels_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, where the experts' weights lie in one storage."""
    _, ours, held = pair("mixtral")
    firsts, seconds = (in_one_storage(weights) for weights in zip(*held.weights, strict=True))
    held.weights = list(zip(firsts, seconds, strict=True))
    hidden, index, scores = routed(12, 4, 2, 48)
    found, launched = [], list[str]()
    launch = expert_products._launch
    monkeypatch.setattr(expert_products, "_launch", lambda name, *rest: launched.append(name) or launch(name, *rest))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for ours.backend in ("panel", "triton"):
        y = ours(hidden, index, scores)
        found.append((y, *torch.autograd.grad(y.square().sum(), (hidden, scores))))
    assert launched == ["matmul", "matmul", "matmul_dx", "matmul_dx"]
    for by_panels, together in zip(*found, strict=True):
        assert relative_rms(together, by_panels) < 1e-6
