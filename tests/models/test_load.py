"""``load``: a store becomes a transformers model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from models import decoded_model, relative_rms, tiny_store
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import mebp_triton as mebp
from mebp_triton.store.manifest import accept_companions


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
        with pytest.raises(ValueError, match="is not what it was when the store was made"):
            mebp.load(bent)
        assert accept_companions(bent) == ["config.json"]
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
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", ["o_proj"])
    store = tiny_store("llama")
    model = mebp.load(store, mebp.LoraConfig(r=2), dtype=dtype)
    layer = model.model.layers[0].self_attn.o_proj
    assert type(layer) is torch.nn.Linear and not layer.weight.requires_grad
    assert layer.weight.dtype == torch.float32 and model.model.norm.weight.dtype == dtype
    if dtype == torch.float32:
        ids = torch.arange(3, 15)[None]
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids).logits, decoded_model(store)(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_distributed_data_parallel_sends_the_adapter_alone(store: Path, tmp_path: Path, wrapped: bool) -> None:
    model = mebp.load(store, None if wrapped else mebp.LoraConfig(r=2))
    if wrapped:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", world_size=1, rank=0)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        assert parallel.modules_buffers == []
        names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        assert trained and names - parallel.parameters_to_ignore == trained
        ids = torch.arange(3, 15)[None]
        parallel(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_generation_config_is_the_stores(store: Path, tmp_path: Path) -> None:
    """Chat models end their turns with a token that config.json does not name."""
    copied = shutil.copytree(store, tmp_path / "store")
    ids = torch.arange(3, 9)[None]
    written = mebp.load(copied).generate(input_ids=ids, max_new_tokens=8, pad_token_id=0)[0, 6:].tolist()
    path = copied / "generation_config.json"
    settings = json.loads(path.read_text()) | {"eos_token_id": [2, written[2]], "repetition_penalty": 1.0}
    path.write_text(json.dumps(settings))
    accept_companions(copied)
    model = mebp.load(copied)
    assert model.generation_config.eos_token_id == [2, written[2]]
    stopped = model.generate(input_ids=ids, max_new_tokens=8, pad_token_id=0)[0, 6:].tolist()
    assert stopped == written[: written.index(written[2]) + 1] and len(stopped) < 8
    path.unlink()
    accept_companions(copied)
    assert mebp.load(copied).generation_config.eos_token_id == 2


@pytest.mark.parametrize("content", ["{", "[]", "[1]", '"text"'])
def test_a_damaged_generation_config(store: Path, tmp_path: Path, content: str) -> None:
    copied = shutil.copytree(store, tmp_path / "store")
    (copied / "generation_config.json").write_text(content)
    accept_companions(copied)
    with pytest.raises(
        ValueError, match=r"generation_config\.json is not a usable generation config .*; compare it"
    ) as e:
        mebp.load(copied)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("weights", ["device", "file"])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_peft_cannot_train_an_int4_table_whole(store: Path, tmp_path: Path, weights: Any, name: str) -> None:
    """It would copy the table, train nothing, and save packed codes as an adapter."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[name], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"modules_to_save.*head='float'"):
        peft.get_peft_model(mebp.load(store, weights=weights), config)
    # An adapter that was trained elsewhere is refused as well.
    peft.get_peft_model(decoded_model(store), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"modules_to_save.*head='float'"):
        peft.PeftModel.from_pretrained(mebp.load(store, weights=weights), tmp_path)
    with pytest.raises(ValueError, match="modules_to_save"):
        mebp.load(store, mebp.read_adapter_config(tmp_path))


def test_peft_can_train_a_float_head(store: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(mebp.load(store, head="float"), config)
    truth = peft.get_peft_model(decoded_model(store), config)
    truth.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    ids = torch.arange(3, 15)[None]
    for one in (model, truth):
        one(input_ids=ids, labels=ids).loss.backward()
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    gradients = [dict(one.named_parameters())[name].grad for one in (model, truth)]
    assert relative_rms(*gradients) < 1e-5
    model.save_pretrained(tmp_path)
    assert set(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")) >= {
        "base_model.model.lm_head.weight"
    }


def test_a_dtype_may_be_named_as_in_transformers(store: Path) -> None:
    assert mebp.load(store, dtype="bfloat16").dtype == torch.bfloat16
    for wrong in ("bf17", "int8", "nn"):
        with pytest.raises(ValueError, match=f"dtype must be float32, bfloat16 or float16, got '{wrong}'"):
            mebp.load(store, dtype=wrong)


def test_a_store_is_no_source_of_a_store(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a store already: train it, or decode it first by `mebp merge"):
        mebp.quantize(store, tmp_path / "again")
    assert not any(tmp_path.iterdir())
