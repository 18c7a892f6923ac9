"""Which layers of a model may be int4, under PEFT's layers too, and how they are named."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from models import tiny_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaModel,
    T5Config,
)

from mebp_triton.huggingface.model_layers import (
    base_prefix,
    check_names,
    inner_model,
    linear_layers,
    path_without_peft,
)

ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def llama() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=False))


def in_blocks(names: list[str], prefix: str = "model.layers", blocks: int = 3) -> set[str]:
    return {f"{prefix}.{index}.{name}" for index in range(blocks) for name in names}


def test_the_base_models_layers_without_heads() -> None:
    assert linear_layers(llama()).keys() == in_blocks(ATTENTION + MLP)
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
        gpt2 = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
        t5 = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        translator = AutoModelForSeq2SeqLM.from_config(t5)
    assert linear_layers(classifier).keys() == in_blocks(ATTENTION + MLP), "the classifier's head stays"
    names = {path.rpartition(".")[2] for path in linear_layers(gpt2)}
    assert names == {"c_attn", "c_proj", "c_fc"} and len(linear_layers(gpt2)) == 12
    assert {path.rpartition(".")[2] for path in linear_layers(translator)} == {"q", "k", "v", "o", "wi"}, (
        "wo is float32"
    )


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_what_transformers_keeps_in_float32(attribute: str) -> None:
    model = llama()
    setattr(model, attribute, ["o_proj", "mlp.gate_proj"])
    kept = {"self_attn.o_proj", "mlp.gate_proj"}
    assert linear_layers(model).keys() == in_blocks([name for name in ATTENTION + MLP if name not in kept])
    around = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    assert len(linear_layers(around)) == 15 and not [path for path in linear_layers(around) if "o_proj" in path]


def test_any_module_has_all_its_linear_layers_but_routers() -> None:
    model = nn.ModuleDict({"router": nn.Linear(8, 4), "up": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    assert linear_layers(model).keys() == {"up"}
    assert not linear_layers(nn.Linear(8, 8)), "the model itself cannot be replaced where it is"


def test_layers_inside_of_pefts_and_none_of_pefts_own() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "down_proj"])
    around = peft.get_peft_model(llama(), config)
    prefix = "base_model.model.model.layers"
    wanted = {"self_attn.q_proj.base_layer", *ATTENTION[1:], *MLP[:2]}
    assert linear_layers(around).keys() == in_blocks(sorted(wanted), prefix)
    assert inner_model(around) is around.get_base_model() and inner_model(llama().model).__class__ is LlamaModel
    assert path_without_peft(f"{prefix}.0.self_attn.q_proj.base_layer") == f"{prefix}.0.self_attn.q_proj"


def test_bitsandbytes_layers_are_taken_wherever_they_are() -> None:
    model = llama()
    model.lm_head = bitsandbytes.nn.Linear4bit(48, 97)
    model._keep_in_fp32_modules = ["o_proj"]
    model.model.layers[0].self_attn.o_proj = bitsandbytes.nn.Linear4bit(48, 48)
    layers = linear_layers(model)
    assert {"lm_head", "model.layers.0.self_attn.o_proj"} < layers.keys() and len(layers) == 20


def test_names_that_a_model_has() -> None:
    model = llama()
    check_names("exclude_modules", ["mlp", "layers.1.self_attn", "lm_head", "model.layers.0.mlp.up_proj"], model)
    with pytest.raises(ValueError, match="exclude_modules: LlamaForCausalLM has no module 'q_prj'"):
        check_names("exclude_modules", ["mlp", "q_prj"], model)
    assert base_prefix(model) == "model." and base_prefix(model.model) == ""
