"""A name that selects nothing is an error, and experts get adapters only where they can have them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import tiny_config

import mebp_triton as mebp
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.models.targets import check_targets, resolve_targets

needs_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules in transformers 4")


def test_every_target_selects_a_layer() -> None:
    model, linear = build_skeleton(tiny_config("llama"), torch.float32), ["a.q_proj", "a.k_proj"]
    for targets in ("all-linear", ["q_proj"], ["a.q_proj", "k_proj"], r".*_proj"):
        check_targets(mebp.LoraConfig(target_modules=targets), linear, model)
    for targets, wrong in ((["q_proj", "nope"], "nope"), (["q_proj", "lm_head"], "lm_head"), ("nope.*", "nope.*")):
        with pytest.raises(
            ValueError, match=rf"'{wrong}' matches no linear layer \(but the head\) of LlamaForCausalLM"
        ):
            check_targets(mebp.LoraConfig(target_modules=targets), linear, model)
    excluding = mebp.LoraConfig(target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"])
    with pytest.raises(ValueError, match="'k_proj' matches no linear layer"):
        check_targets(excluding, linear, model)


EXPERTS = {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["experts.up_proj"]}, "'experts.up_proj' matches no experts of LlamaForCausalLM"),
        ({"target_parameters": ["proj"]}, "'proj' matches no experts"),
        ({"target_parameters": ["down_proj"], "lora_dropout": 0.1}, "lora_dropout must be 0 where experts"),
        ({"target_modules": "all-linear-and-experts", "lora_dropout": 0.1}, "lora_dropout must be 0"),
    ],
)
def test_experts_that_cannot_have_adapters(settings: dict[str, Any], message: str) -> None:
    model, linear = build_skeleton(tiny_config("llama"), torch.float32), ["a.q_proj"]
    with pytest.raises(ValueError, match=message):
        check_targets(mebp.LoraConfig(**settings), linear, model, EXPERTS)
    check_targets(mebp.LoraConfig(target_parameters=["experts.down_proj"], lora_dropout=0), linear, model, EXPERTS)
    with pytest.raises(ValueError, match="no experts of LlamaForCausalLM can have adapters here; use all-linear"):
        check_targets(mebp.LoraConfig(target_modules="all-linear-and-experts"), linear, model)


@needs_5
def test_experts_count_only_where_the_store_has_them_in_int4() -> None:
    class Older:
        matrices = ()
        floats = {f"model.layers.{at}.mlp.experts.{name}" for at in range(3) for name in ("gate_up_proj", "down_proj")}

    model = build_skeleton(tiny_config("mixtral"), torch.float32)
    config = mebp.LoraConfig(target_modules="all-linear-and-experts")
    with pytest.raises(ValueError, match="no experts of MixtralForCausalLM"):
        resolve_targets(config, model, Older(), "model.layers")


def test_patterns_that_match_no_layer_with_an_adapter_are_named() -> None:
    model = build_skeleton(tiny_config("llama"), torch.float32)
    stored = SimpleNamespace(matrices=[], floats=[])
    alphas = {r"layers\.0\.self_attn\.q_proj\.weight": 2.0, "q_proj": 4.0}
    config = mebp.LoraConfig(target_modules=["q_proj"], rank_pattern={"zzz": 4, "k_proj": 2}, alpha_pattern=alphas)
    with pytest.warns(
        UserWarning, match="rank_pattern 'zzz', rank_pattern 'k_proj' matches no layer that gets"
    ) as seen:
        resolve_targets(config, model, stored, "model.layers")
    assert not any("alpha_pattern" in str(warning.message) for warning in seen)
