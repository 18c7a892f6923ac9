"""transformers' from_pretrained and save_pretrained with int4 layers: values, files, gradients, refusals."""

from __future__ import annotations

import copy
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import batch, randomize_adapter, relative_rms, save_tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

from mebp_triton import Int4Config, Int4Linear, Int4LoRALinear
from mebp_triton.huggingface import quantizer
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("int4")
    load_int4(source).save_pretrained(directory)
    return directory


def load_int4(source: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    settings = Int4Config(**({"group_size": 32} | config))
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=settings)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def int4_layers(model: Any) -> dict[str, Int4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}


def assert_same_codes(model: Any, truth: Any) -> None:
    layers, wanted = int4_layers(model), int4_layers(truth)
    assert layers.keys() == wanted.keys() and layers
    for name, layer in layers.items():
        tensors, expected = layer.int4().tensors(), wanted[name].int4().tensors()
        assert tensors.keys() == expected.keys()
        for kind, tensor in tensors.items():
            assert tensor.dtype == expected[kind].dtype and torch.equal(tensor, expected[kind]), (name, kind)


def edited(directory: Path, target: Path, tensors: dict[str, Any] | None = None, config: Any = None) -> Path:
    """A copy with some tensors changed (None: left out), and some settings."""
    shutil.copytree(directory, target)
    file = target / "model.safetensors"
    held = {name: value for name, value in (load_file(file) | (tensors or {})).items() if value is not None}
    save_file(held, file, {"format": "pt"})
    content = json.loads((target / "config.json").read_text())
    if config is not None:
        content["quantization_config"].update(config)
    (target / "config.json").write_text(json.dumps(content))
    return target


# --- values and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["symmetric", "affine", "codebook"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_loading_quantizes_as_quantize_matrix_and_saving_keeps_every_bit(
    architecture: str, scheme: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = save_tiny_model(architecture, tmp_path / "model")
    floats, model = load(source, dtype), load_int4(source, dtype, scheme=scheme)
    linear = {name: module for name, module in floats.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    layers = int4_layers(model)
    assert layers.keys() == linear.keys() - {"lm_head"}
    for name, layer in layers.items():
        old = linear[name]
        value = old.weight.detach().t().contiguous() if isinstance(old, Conv1D) else old.weight.detach()
        expected, tensors = quantize_matrix(value, scheme, 32)[0].tensors(), layer.int4().tensors()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[kind]) for kind, tensor in tensors.items()), name
        assert layer.compute_dtype == dtype and not layer.weight.requires_grad

    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mebp_int4" and config["scheme"] == scheme
    again = load(tmp_path / "saved", dtype)
    named = dict(again.named_parameters())
    assert all(torch.equal(parameter, named[name]) for name, parameter in model.named_parameters())
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    # The dtype asked for does not touch the scales.
    for other in (dtype, torch.float32, torch.bfloat16):
        loaded = load(tmp_path / "saved", other)
        assert_same_codes(loaded, model)
        assert {layer.compute_dtype for layer in int4_layers(loaded).values()} == {other}


def test_a_tied_head_stays_the_embedding(source: Path, saved: Path) -> None:
    for model in (load_int4(source), load(saved)):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert type(model.lm_head) is nn.Linear


def test_scales_beyond_float16_are_kept(source: Path, tmp_path: Path) -> None:
    weight = load_file(source / "model.safetensors")[f"{UP}.weight"]
    big = edited(source, tmp_path / "big", {f"{UP}.weight": weight * 1e6})
    settings = Int4Config(scheme="affine", group_size=32)
    model = AutoModelForCausalLM.from_pretrained(big, dtype=torch.float32, quantization_config=settings)
    assert model.get_submodule(UP).int4().scales.dtype == torch.float32
    assert settings.float32_scales == []  # the caller's settings say nothing about one model
    model.save_pretrained(tmp_path / "saved")
    assert_same_codes(load(tmp_path / "saved", torch.bfloat16), model)
    base = AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same_codes(base, model.model)


def test_what_is_not_to_be_converted_stays_float(source: Path, tmp_path: Path) -> None:
    model, floats = load_int4(source, modules_to_not_convert=["k_proj", "layers.0.mlp", "lm_head"]), load(source)
    model.save_pretrained(tmp_path / "saved")
    mlp = {f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down")}
    for loaded in (model, load(tmp_path / "saved")):
        kept = {name for name, module in loaded.named_modules() if type(module) is nn.Linear}
        assert kept == mlp | {"lm_head"} | {f"model.layers.{index}.self_attn.k_proj" for index in range(3)}
        for name in kept:
            assert torch.equal(loaded.get_submodule(name).weight, floats.get_submodule(name).weight)


def test_a_base_model_and_another_head(source: Path, saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    base = AutoModel.from_pretrained(saved, dtype=torch.float32)
    assert_same_codes(base, model.model)
    base.save_pretrained(tmp_path / "base")
    assert_same_codes(load(tmp_path / "base"), model)
    options: dict[str, Any] = {"quantization_config": Int4Config(group_size=32)}
    for path, named in ((source, options), (saved, {})):
        classifier = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **named)
        assert type(classifier.score) is nn.Linear
        assert_same_codes(classifier.model, model.model)


def test_layers_that_the_checkpoint_lacks_stay_float(source: Path, tmp_path: Path) -> None:
    model = load_int4(edited(source, tmp_path / "lacking", {f"{UP}.weight": None}))
    assert type(model.get_submodule(UP)) is nn.Linear
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved").get_submodule(UP)
    assert type(again) is nn.Linear and torch.equal(again.weight, model.get_submodule(UP).weight)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(source: Path, saved: Path, device_map: Any) -> None:
    options: dict[str, Any] = {"quantization_config": Int4Config(group_size=32)}
    for path, named in ((source, options), (saved, {})):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map=device_map, **named)
        assert_same_codes(model, load(saved))


def test_one_float_matrix_is_alive_at_a_time(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(weight: torch.Tensor, *options: Any) -> Any:
        assert not [ref for ref in seen if ref() is not None]
        seen.append(weakref.ref(weight))
        return quantize_matrix(weight, *options)

    monkeypatch.setattr(quantizer, "quantize_matrix", watched)
    load_int4(source)
    assert len(seen) == 21


def test_moving_and_copying_keep_the_format(source: Path) -> None:
    model = load_int4(source, scheme="codebook")
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert_same_codes(moved, model)
    assert moved.model.norm.weight.dtype == torch.bfloat16
    assert moved(**batch()).logits.dtype == torch.bfloat16


# --- training -------------------------------------------------------------------------------------------------------


def adapted(model: Any, seed: int = 3) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    randomize_adapter(wrapped, seed)
    return wrapped


@torch.no_grad()
def decoded(source: Path, model: Any, dtype: torch.dtype) -> Any:
    """transformers' float model of ``source`` with the decoded weights of ``model``."""
    floats = load(source, dtype)
    for name, layer in int4_layers(model).items():
        value, old = decode(layer.int4(), torch.float64), floats.get_submodule(name)
        old.weight.copy_(value.t() if isinstance(old, Conv1D) else value)
    return floats


def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(**batch())
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients and all(gradient is not None for gradient in gradients.values())
    return out.logits.detach(), gradients


@pytest.mark.parametrize(("architecture", "scheme"), [("llama", "symmetric"), ("gpt2", "affine"), ("opt", "codebook")])
def test_gradients_equal_those_of_the_decoded_model_in_float64(architecture: str, scheme: Any, tmp_path: Path) -> None:
    source = save_tiny_model(architecture, tmp_path / "model")
    model = load_int4(source, scheme=scheme)
    exact, expected = run(adapted(decoded(source, model, torch.float64)).double())
    logits, gradients = run(adapted(model))
    assert relative_rms(logits, exact) < 1e-5
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_rms(gradient, expected[name]) < 1e-5, name


def test_bfloat16_is_as_near_to_float64_as_a_float_model_is(source: Path) -> None:
    model = load_int4(source, torch.bfloat16)
    peer = decoded(source, model, torch.bfloat16)
    # The truth: unrounded decoded weights, and the rest as both have it.
    truth = decoded(source, model, torch.float64)
    kept = {name: p for name, p in peer.named_parameters() if name.rpartition(".")[0] not in int4_layers(model)}
    truth.load_state_dict(kept, strict=False)
    exact, expected = run(adapted(truth).double())
    logits, gradients = run(adapted(model))
    peer_logits, peer_gradients = run(adapted(peer))
    assert relative_rms(logits, exact) < 1.2 * relative_rms(peer_logits, exact)
    total, peer_total = (
        sum(relative_rms(g, expected[name]) for name, g in x.items()) for x in (gradients, peer_gradients)
    )
    assert total < 1.2 * peer_total


def trainer(model: Any, output: Path, **options: Any) -> Trainer:
    rows = [{key: value[0] for key, value in batch(rows=1, padding=None, seed=seed).items()} for seed in range(8)]
    settings: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "seed": 1}
    settings |= {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": []} | options
    return Trainer(model, TrainingArguments(output_dir=str(output), **settings), train_dataset=rows)


def test_a_peft_adapter_trains_to_the_losses_of_the_decoded_model(source: Path, tmp_path: Path) -> None:
    model = load_int4(source)
    jobs = [trainer(adapted(base), tmp_path / "run") for base in (decoded(source, model, torch.float32), model)]
    losses = []
    for job in jobs:
        job.train()
        losses.append([entry["loss"] for entry in job.state.log_history if "loss" in entry])
    assert len(losses[0]) == 6 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # What Trainer saves is the adapter, and it fits the model that is quantized again.
    jobs[1].save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(load_int4(source), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, jobs[1].model.eval()(**batch()).logits)


def test_pefts_layers_are_ours(source: Path) -> None:
    """Without a call of ``register_peft``."""
    model = adapted(load_int4(source))
    assert sum(type(module).__name__ == "PeftInt4Linear" for module in model.modules()) == 21
    with pytest.raises(NotImplementedError, match="an int4 weight cannot take an adapter in"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="does not support use_dora=True"):
        peft.get_peft_model(load_int4(source), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))


def test_trainer_wants_adapters(source: Path, tmp_path: Path) -> None:
    model = load_int4(source)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer(model, tmp_path)
    model.requires_grad_(False)
    ours = Int4LoRALinear(model.get_submodule(UP).int4(), None, torch.float32, rank=4, scaling=2.0)
    model.model.layers[1].mlp.up_proj = ours
    trainer(model, tmp_path, save_strategy="no").train()
    assert ours.lora_B.abs().max() > 0
    with pytest.raises(ValueError, match=f"{UP} has an adapter, .* use save_adapter"):
        model.save_pretrained(tmp_path / "saved")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int3"}, "scheme must be one of symmetric, affine, codebook, got 'int3'"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128, got 48"),
        ({"group_size": True}, "group_size must be one of 32, 64, 128, got True"),
        ({"modules_to_not_convert": [3]}, r"modules_to_not_convert must be a list of module names, got \[3\]"),
        ({"layout": "planar64-v9"}, "layout 'planar64-v9' cannot be read"),
        ({"groupsize": 32}, "'groupsize' is no setting of Int4Config"),
        ({"quant_method": "gptq"}, "quant_method must be 'mebp_int4', got 'gptq'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int4Config(**settings)


def test_a_name_that_matches_no_module(source: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no module 'q_porj'"):
        load_int4(source, modules_to_not_convert=["q_porj"])


def test_offloading_is_refused(source: Path, saved: Path, tmp_path: Path) -> None:
    parts = ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0", "model.layers.1")
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.2": "disk"}
    options: dict[str, Any] = {"quantization_config": Int4Config()}
    for path, named in ((source, options), (saved, {})):
        with pytest.raises(ValueError, match="device_map offloads layers to disk"):
            AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=tmp_path, **named)


def test_weights_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    weight = load_file(source / "model.safetensors")[f"{UP}.weight"]
    weight[3, 3] = float("nan")
    # transformers 5 reports our message, and raises an error of its own.
    with pytest.raises((ValueError, RuntimeError), match="must be finite|automatic conversion of the weights"):
        load_int4(edited(source, tmp_path / "broken", {f"{UP}.weight": weight}))


@pytest.mark.parametrize("name", ["scales", "weight"])
def test_tensors_that_are_missing(saved: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"the checkpoint lacks {UP}.{name}"):
        load(edited(saved, tmp_path / "broken", {f"{UP}.{name}": None}))


def test_experts_that_were_layers_of_their_own(tmp_path: Path) -> None:
    """As transformers 4 saves a mixture: transformers 5 joins the experts, and has no place for their int4 weights."""
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    size = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(MixtralConfig(**size, **changes)).save_pretrained(tmp_path / "float")
    load_int4(tmp_path / "float").save_pretrained(tmp_path / "int4")
    names = [f"model.layers.0.block_sparse_moe.experts.{n}.w{w}" for n in range(4) for w in (1, 2, 3)]
    tensors = {f"{name}.weight": torch.zeros(64, 32, dtype=torch.uint8) for name in names}
    tensors |= {f"{name}.scales": torch.zeros(2, 128, dtype=torch.uint8) for name in names}
    mixture = edited(tmp_path / "int4", tmp_path / "mixture", tensors)
    if quantizer.BEFORE_5:
        assert f"{names[0]}" in int4_layers(load(mixture))
        return
    found = r"experts\.\d\.w\d is an int4 layer, and a part of model.layers.0.mlp.experts in transformers 5"
    with pytest.raises(ValueError, match=found):
        load(mixture)


def test_scales_that_were_tampered_with(saved: Path, tmp_path: Path) -> None:
    scales = load_file(saved / "model.safetensors")[f"{UP}.scales"]
    short = edited(saved, tmp_path / "short", {f"{UP}.scales": scales[:, :-2].contiguous()})
    with pytest.raises(RuntimeError, match="size"):
        load(short)
    with pytest.raises((ValueError, RuntimeError), match=f"the checkpoint lacks {UP}.scales|size mismatch"):
        AutoModelForCausalLM.from_pretrained(short, ignore_mismatched_sizes=True)
    wild = edited(saved, tmp_path / "wild", {f"{UP}.scales": torch.full_like(scales, 255)})
    with pytest.raises(ValueError, match=f"{UP}.scales is not finite"):
        load(wild)


def test_a_config_that_was_tampered_with(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\..*minimum"):
        load(edited(saved, tmp_path / "affine", config={"scheme": "affine"}))
    with pytest.raises(RuntimeError, match="size"):
        load(edited(saved, tmp_path / "groups", config={"group_size": 64}))
    with pytest.raises(ValueError, match="is no setting of Int4Config"):
        load(edited(saved, tmp_path / "more", config={"bits": 4}))


def test_without_the_method_the_directory_is_not_read_as_float(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported the plug-in."""
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "mebp_int4")
    with pytest.raises(RuntimeError, match="size"):
        load(saved)
