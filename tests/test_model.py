"""``load``: a store becomes a transformers model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import decoded_model, tiny_store
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import mebp_triton as mebp


@pytest.fixture(scope="module")
def store() -> Path:
    return tiny_store("qwen2")


def test_as_from_pretrained_would_return_it(store: Path) -> None:
    model = mebp.load(store, mebp.LoraConfig(r=2))
    assert type(model).__name__ == "Qwen2ForCausalLM" and not model.training
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(name.endswith(("lora_A", "lora_B")) for name in trainable)
    assert not any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers()))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, decoded_model(store)(input_ids=ids).logits, atol=1e-5)


def test_a_tied_head_can_be_tied_again() -> None:
    """lm-eval does it to every model that it is given."""
    model, ids = mebp.load(tiny_store("llama")), torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.tie_weights()
        assert torch.equal(model(input_ids=ids).logits, before)


def test_generates_as_the_decoded_model(store: Path) -> None:
    ids = torch.arange(3, 9)[None]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = mebp.load(store, weights="file").generate(input_ids=ids, **options)
    assert torch.equal(ours, decoded_model(store).generate(input_ids=ids, **options))


def test_the_seed_makes_the_adapter(store: Path) -> None:
    first, again, other = (mebp.load(store, mebp.LoraConfig(r=2), seed=seed) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.up_proj.lora_A"
    values = [dict(model.named_parameters())[name] for model in (first, again, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_a_config_that_contradicts_the_weights(store: Path, tmp_path: Path) -> None:
    for key, value, message in (
        ("num_hidden_layers", 2, "no place for model.layers.2"),
        ("num_hidden_layers", 4, "no weights for model.layers.3"),
        ("vocab_size", 98, "the config says"),
        ("tie_word_embeddings", True, "whether the head is tied"),
    ):
        bent = tmp_path / f"{key}-{value}"
        shutil.copytree(store, bent)
        config = json.loads((bent / "config.json").read_text())
        config.pop("layer_types", None)
        (bent / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=message):
            mebp.load(bent)


def test_targets_that_select_nothing(store: Path) -> None:
    for targets in (["q_proj", "nope"], ["q_proj", "lm_head"], "nope.*"):
        with pytest.raises(ValueError, match="matches no linear layer"):
            mebp.load(store, mebp.LoraConfig(r=2, target_modules=targets))


def test_wrong_arguments(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_dtype must be float32 or bfloat16"):
        mebp.load(store, adapter_dtype=torch.float16)
    with pytest.raises(ValueError, match="is not a directory"):
        mebp.load(tmp_path / "none")
    with pytest.raises(ValueError, match="is no module"):
        mebp.load(store, blocks="model.nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_transformers_keeps_in_float32_is_a_float_layer(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSeek's indexers: modelling code reads the dtype of their weight."""
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", ["self_attn.o_proj"])
    store = tiny_store("llama")
    model = mebp.load(store, mebp.LoraConfig(r=2), dtype=dtype)
    layer = model.model.layers[0].self_attn.o_proj
    assert type(layer) is torch.nn.Linear and not layer.weight.requires_grad
    assert layer.weight.dtype == torch.float32 and model.model.norm.weight.dtype == dtype
    if dtype == torch.float32:
        ids = torch.arange(3, 15)[None]
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids).logits, decoded_model(store)(input_ids=ids).logits, atol=1e-5)
