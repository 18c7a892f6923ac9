"""A skeleton is filled from a store: every module and tensor in its place, or a message that says what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import decoded_model, tiny_store
from torch import nn
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import mebp_triton as mebp
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.int4_module import Int4Embedding
from mebp_triton.layers.linear import Int4Linear, Int4LoRALinear
from mebp_triton.models.build import Builder, Numerics, check_adapter_dtype, with_adapter
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store

CPU = Numerics(torch.device("cpu"))
IDS = torch.arange(3, 15)[None]


def built(store: Path, lora: Any = None, numerics: Numerics = CPU, seed: int = 0, **changes: Any) -> tuple[Any, Any]:
    """A builder that has done its work, and its model; ``changes`` are the config's."""
    config = AutoConfig.from_pretrained(store, **changes)
    model = build_skeleton(config, numerics.dtype)
    builder = Builder(Store(store), model, lora, numerics, seed)
    builder.fill(lambda modules: None)
    builder.finish(config)
    return builder, model


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_every_module_has_the_stores_weight(shared_store: Any, architecture: str) -> None:
    store = shared_store(architecture)
    builder, model = built(store, mebp.LoraConfig(r=2, target_modules=["q_proj", "c_attn"]))
    opened, truth = Store(store), dict(decoded_model(store).named_parameters())
    assert builder.modules.keys() == opened.matrices.keys()
    for name, module in builder.modules.items():
        assert model.get_submodule(name) is module
        assert torch.equal(decode(module.int4()), decode(opened.weight(name))), name
        adapted = name.endswith(("q_proj", "c_attn"))
        assert isinstance(module, Int4LoRALinear) == adapted and not module.training
        if adapted:
            assert module.fan_in_fan_out == (architecture == "gpt2")
    for name, parameter in model.named_parameters():
        if name in opened.floats:
            assert torch.equal(parameter, truth[name]) and not parameter.requires_grad
    assert not any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers()))


def test_a_tied_head_reads_the_embedding_wherever_that_lies(shared_store: Any) -> None:
    store = shared_store("llama")
    model = build_skeleton(AutoConfig.from_pretrained(store), torch.float32)
    builder = Builder(Store(store), model, None, CPU, 0)
    moved = quantize_matrix(torch.randn(97, 48), group_size=64, bits=8)[0]

    def place(modules: dict[str, Any]) -> None:
        assert "lm_head" not in modules
        table = modules["model.embed_tokens"]
        assert isinstance(table, Int4Embedding)
        table.set_int4(moved)
        table.rows, table.device = object(), torch.device("meta")

    builder.fill(place)
    table = model.get_input_embeddings()
    assert builder.head is model.lm_head and builder.head_name == "lm_head"
    assert builder.head.int4().packed is table.int4().packed is moved.packed
    assert builder.head.rows is table.rows and builder.head.device == table.device


def test_the_seed_draws_the_adapter(shared_store: Any) -> None:
    store = shared_store("qwen2")
    first, again, other = (built(store, mebp.LoraConfig(r=2), seed=seed)[1] for seed in (1, 1, 2))
    values = [model.model.layers[1].mlp.up_proj.lora_A for model in (first, again, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "its config has no place for model.layers.2"),
        ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, "has no weights for model.layers.3"),
        ({"vocab_size": 98}, r"embed_tokens is \(97, 48\), the config says \(98, 48\)"),
        ({"tie_word_embeddings": True}, "disagree on whether the head is tied"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_matrices(shared_store: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(shared_store("qwen2"), **changes)


def test_float_tensors_that_do_not_fit(shared_store: Any) -> None:
    store = Store(shared_store("qwen2"))
    model = build_skeleton(AutoConfig.from_pretrained(store.directory), torch.float32)
    model.model.norm.weight = nn.Parameter(torch.empty(49, device="meta"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(48,\), the config says \(49,\)"):
        Builder(store, model, None, CPU, 0).fill(lambda modules: None)
    del store.floats["model.norm.weight"]
    model = build_skeleton(AutoConfig.from_pretrained(store.directory), torch.float32)
    with pytest.raises(ValueError, match=r"has no tensor model\.norm\.weight"):
        Builder(store, model, None, CPU, 0).fill(lambda modules: None)


def test_buffers_come_from_the_store_where_it_has_them(shared_store: Any) -> None:
    store = Store(shared_store("qwen2"))
    model = build_skeleton(AutoConfig.from_pretrained(store.directory), torch.float16)
    norm = model.model.norm
    norm.register_buffer("stored", torch.zeros(48, dtype=torch.float16))
    norm.register_buffer("own", torch.ones(3))
    store.floats["model.norm.stored"] = store.floats["model.norm.weight"]
    file = store.files[store.floats["model.norm.weight"]]
    file.entries["model.norm.stored"] = file.entries["model.norm.weight"]
    Builder(store, model, None, Numerics(torch.device("cpu"), torch.float16), 0).fill(lambda modules: None)
    assert torch.equal(norm.stored, norm.weight) and norm.stored.dtype == torch.float16
    assert torch.equal(norm.own, torch.ones(3)) and norm.own.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_transformers_keeps_in_float32_is_a_float_layer(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's indexers are such: modelling code reads the dtype of their weight."""
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", ["o_proj"])
    store = tiny_store("llama", tmp_path)
    _, model = built(store, mebp.LoraConfig(r=2), Numerics(torch.device("cpu"), dtype))
    layer = model.model.layers[0].self_attn.o_proj
    assert type(layer) is nn.Linear and not layer.weight.requires_grad
    assert layer.weight.dtype == torch.float32 and model.model.norm.weight.dtype == dtype
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.allclose(model(input_ids=IDS).logits, decoded_model(store)(input_ids=IDS).logits, atol=1e-5)


# --- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_takes_over_the_frozen_layer() -> None:
    bias = torch.randn(8)
    frozen = Int4Linear(quantize_matrix(torch.randn(8, 64))[0], bias, torch.float16, "panel")
    config = mebp.LoraConfig(r=2, rank_pattern={"up": 3}, lora_alpha=6, lora_dropout=0.5)

    def layer(path: str, **options: Any) -> Int4LoRALinear:
        generator = torch.Generator().manual_seed(1)
        return with_adapter(frozen, path, config, torch.bfloat16, generator, **({"transposed": False} | options))

    up, down = layer("up"), layer("down", transposed=True)
    assert up.bias is frozen.bias and up.int4().packed.data_ptr() == frozen.int4().packed.data_ptr()
    assert (up.compute_dtype, up.backend, up.lora_dropout.p) == (torch.float16, "panel", 0.5)
    assert tuple(up.lora_A.shape) == (3, 64) and tuple(down.lora_A.shape) == (2, 64)
    assert (up.scaling, down.scaling) == (2, 3) and (up.fan_in_fan_out, down.fan_in_fan_out) == (False, True)
    assert up.lora_A.dtype == up.lora_B.dtype == torch.bfloat16
    assert layer("up", device=torch.device("meta")).lora_B.device.type == "meta"


def test_the_dtypes_of_adapters() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check_adapter_dtype(dtype)
    with pytest.raises(ValueError, match=r"adapter_dtype must be float32 or bfloat16, got torch\.float16"):
        check_adapter_dtype(torch.float16)
