"""transformers' from_pretrained and save_pretrained with int4 layers: values, files, gradients, refusals."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from int4_models import (
    assert_same_codes,
    decoded_twin,
    from_pretrained,
    int4_layers,
    logits,
    quantized,
    with_bitsandbytes,
)
from models import batch, randomize_adapter, relative_rms, save_tiny_model
from pairs import pairs
from safetensors.torch import load_file, save_file
from torch import nn
from trainers import history, make_trainer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, MixtralConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

import mebp_triton as mebp
from mebp_triton import Int4Config, Int4LoRALinear
from mebp_triton.huggingface import model_layers, quantizer
from mebp_triton.huggingface.bitsandbytes_layers import is_linear4bit
from mebp_triton.huggingface.quantizer import saved_tensors
from mebp_triton.kernels.names import FORMS, Form
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.linear import Int4Linear

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def source(shared_store: Any) -> Path:
    return shared_store("llama").parent / "model"


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    """An int4 model that tests only read."""
    return quantized(source, scheme="symmetric")


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("int4")
    model.save_pretrained(directory)
    return directory


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


@pytest.mark.parametrize(
    ("architecture", "form", "dtype"),
    pairs(["llama", "gpt2", "opt"], [form for form in FORMS if form.group_size == 32], [torch.float32, torch.bfloat16]),
)
def test_loading_quantizes_as_quantize_matrix_and_saving_keeps_every_bit(
    architecture: str, form: Form, dtype: torch.dtype, shared_store: Any, tmp_path: Path
) -> None:
    source = shared_store(architecture).parent / "model"
    scheme, _, bits = form
    floats, model = from_pretrained(source, dtype), quantized(source, dtype, scheme=scheme, bits=bits)
    linear = {name: module for name, module in floats.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    layers = int4_layers(model)
    assert layers.keys() == linear.keys() - {"lm_head"}
    for name, layer in layers.items():
        old = linear[name]
        value = old.weight.detach().t().contiguous() if isinstance(old, Conv1D) else old.weight.detach()
        expected, tensors = quantize_matrix(value, scheme, 32, bits=bits)[0].tensors(), layer.int4().tensors()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[kind]) for kind, tensor in tensors.items()), name
        assert layer.compute_dtype == dtype and not layer.weight.requires_grad

    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mebp_int4" and config["scheme"] == scheme
    assert config.get("bits") == (None if bits == 4 else 8), "older versions know no other width"
    again = from_pretrained(tmp_path, dtype)
    named = dict(again.named_parameters())
    assert all(torch.equal(parameter, named[name]) for name, parameter in model.named_parameters())
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    # The dtype asked for does not touch the scales.
    other = from_pretrained(tmp_path, torch.bfloat16 if dtype == torch.float32 else torch.float32)
    for loaded, wanted in ((again, dtype), (other, other.dtype)):
        assert_same_codes(loaded, model)
        assert {layer.compute_dtype for layer in int4_layers(loaded).values()} == {wanted}


def test_a_tied_head_stays_the_embedding(model: Any, saved: Path) -> None:
    for loaded in (model, from_pretrained(saved)):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert type(loaded.lm_head) is nn.Linear


def test_scales_beyond_float16_are_kept(source: Path, tmp_path: Path) -> None:
    weight = load_file(source / "model.safetensors")[f"{UP}.weight"]
    big = edited(source, tmp_path / "big", {f"{UP}.weight": weight * 1e6})
    settings = Int4Config(scheme="affine", group_size=32)
    model = AutoModelForCausalLM.from_pretrained(big, dtype=torch.float32, quantization_config=settings)
    assert model.get_submodule(UP).int4().scales.dtype == torch.float32
    assert settings.float32_scales == []  # the caller's settings say nothing about one model
    model.save_pretrained(tmp_path / "saved")
    assert_same_codes(from_pretrained(tmp_path / "saved", torch.bfloat16), model)
    base = AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same_codes(base, model.model)


def test_what_is_not_to_be_converted_stays_float(source: Path, tmp_path: Path) -> None:
    model = quantized(source, modules_to_not_convert=["k_proj", "layers.0.mlp", "lm_head"])
    floats = from_pretrained(source)
    model.save_pretrained(tmp_path / "saved")
    mlp = {f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down")}
    for loaded in (model, from_pretrained(tmp_path / "saved")):
        kept = {name for name, module in loaded.named_modules() if type(module) is nn.Linear}
        assert kept == mlp | {"lm_head"} | {f"model.layers.{index}.self_attn.k_proj" for index in range(3)}
        for name in kept:
            assert torch.equal(loaded.get_submodule(name).weight, floats.get_submodule(name).weight)


def test_a_base_model_and_another_head(source: Path, model: Any, saved: Path, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(saved, dtype=torch.float32)
    assert_same_codes(base, model.model)
    base.save_pretrained(tmp_path / "base")
    assert_same_codes(from_pretrained(tmp_path / "base"), model)
    options: dict[str, Any] = {"quantization_config": Int4Config("symmetric", group_size=32)}
    for path, named in ((source, options), (saved, {})):
        classifier = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **named)
        assert type(classifier.score) is nn.Linear
        assert_same_codes(classifier.model, model.model)


def test_layers_that_the_checkpoint_lacks_stay_float(source: Path, tmp_path: Path) -> None:
    model = quantized(edited(source, tmp_path / "lacking", {f"{UP}.weight": None}))
    assert type(model.get_submodule(UP)) is nn.Linear
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved").get_submodule(UP)
    assert type(again) is nn.Linear and torch.equal(again.weight, model.get_submodule(UP).weight)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_device_maps(source: Path, model: Any, saved: Path, device_map: Any) -> None:
    options: dict[str, Any] = {"quantization_config": Int4Config("symmetric", group_size=32)}
    for path, named in ((source, options), (saved, {})):
        assert_same_codes(from_pretrained(path, device_map=device_map, **named), model)


def test_one_float_matrix_is_alive_at_a_time(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(weight: torch.Tensor, *options: Any, **named: Any) -> Any:
        assert not [ref for ref in seen if ref() is not None]
        seen.append(weakref.ref(weight))
        return quantize_matrix(weight, *options, **named)

    monkeypatch.setattr(quantizer, "quantize_matrix", watched)
    quantized(source)
    assert len(seen) == 21


def test_moving_and_copying_keep_the_format(source: Path) -> None:
    model = quantized(source, scheme="codebook")
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert_same_codes(moved, model)
    assert moved.model.norm.weight.dtype == torch.bfloat16
    assert moved(**batch()).logits.dtype == torch.bfloat16


def test_tensors_are_saved_as_bytes_without_codebooks(source: Path) -> None:
    model = quantized(source, scheme="codebook")
    tensors, own = dict(saved_tensors(model)), model.state_dict()
    layers = int4_layers(model)
    assert tensors.keys() == own.keys() - {f"{name}.codebook" for name in layers}
    for name, layer in layers.items():
        assert tensors[f"{name}.scales"].dtype == torch.uint8
        assert torch.equal(tensors[f"{name}.scales"].view(torch.float16), layer.int4().scales)
    codebooks = {layer.int4().codebook.data_ptr() for layer in layers.values()}  # type: ignore[union-attr]
    assert len(codebooks) == len(layers), "transformers does not save tensors that layers share"


# --- what replace_linears made --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(shared_store: Any) -> Path:
    """A model whose sizes bitsandbytes can quantize."""
    return shared_store("llama", config={"hidden_size": 64, "intermediate_size": 128}).parent / "model"


@pytest.mark.parametrize(
    ("architecture", "scheme", "bits"),
    [
        ("llama", "symmetric", 4),
        ("gpt2", "affine", 4),
        ("llama", "codebook", 4),
        ("llama", "nf4", 4),
        ("llama", "affine", 8),
        ("gpt2", "symmetric", 8),
    ],
)
def test_what_was_replaced_and_saved_is_loaded_bit_for_bit(
    architecture: str, scheme: Any, bits: int, wide: Path, shared_store: Any, tmp_path: Path
) -> None:
    if scheme == "nf4":
        model = mebp.replace_linears(with_bitsandbytes(wide))
    else:
        source = shared_store(architecture).parent / "model"
        excluded = "k_proj" if architecture == "llama" else "h.1.mlp"
        model = mebp.replace_linears(from_pretrained(source), exclude_modules=excluded, scheme=scheme, bits=bits)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert_same_codes(again, model)
    expected = logits(model)
    assert torch.equal(logits(again), expected)
    # And as a state dict: Trainer takes up what save_pretrained wrote.
    with torch.no_grad():
        for layer in int4_layers(again).values():
            layer.int4().scales.zero_()
    held = load_file(tmp_path / "model.safetensors")
    assert not again.load_state_dict(held, strict=False).unexpected_keys
    assert torch.equal(logits(again), expected)


def test_a_model_of_int4_config_keeps_its_settings(source: Path, tmp_path: Path) -> None:
    model = quantized(source, scheme="affine", modules_to_not_convert=["mlp"])
    mebp.replace_linears(model, scheme="affine", group_size=32, exclude_modules=["down_proj"])
    model.save_pretrained(tmp_path / "saved")
    again, expected = from_pretrained(tmp_path / "saved"), logits(model)
    assert torch.equal(logits(again), expected)
    assert {n.split(".")[-1] for n, m in again.model.named_modules() if type(m) is nn.Linear} == {"down_proj"}
    around = peft.get_peft_model(again, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj.base_layer is inside a layer of PEFT: save the PeftModel, or unload"):
        around.get_base_model().save_pretrained(tmp_path / "wrong")
    around.unload().save_pretrained(tmp_path / "unloaded")
    assert torch.equal(logits(from_pretrained(tmp_path / "unloaded")), expected)


def mixed_schemes(directory: Path) -> Any:
    model = mebp.replace_linears(from_pretrained(directory), exclude_modules="mlp")
    return mebp.replace_linears(model, scheme="symmetric")


def int4_head(directory: Path) -> Any:
    model = mebp.replace_linears(from_pretrained(directory))
    model.lm_head = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    return model


def two_level(directory: Path) -> Any:
    model = mebp.replace_linears(from_pretrained(directory))
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.int4()
    layer.set_int4(quantize_matrix(decode(weight, torch.float32), *weight.form[:2], scale_dtype=torch.int8)[0])
    return model


UNSAVED: dict[str, tuple[Any, str]] = {
    "bitsandbytes": (
        lambda path: mebp.replace_linears(with_bitsandbytes(path), exclude_modules=["q_proj"]),
        "q_proj is bitsandbytes' layer, others are int4",
    ),
    "two levels": (two_level, "the model has scales of two levels"),
    "FP4": (lambda path: mebp.replace_linears(with_bitsandbytes(path, "fp4")), "the model has FP4 weights"),
    "schemes": (
        mixed_schemes,
        "one scheme, group size and width, .* codebook, groups of 32; 4 bits, symmetric",
    ),
    "head": (int4_head, "lm_head is int4, and from_pretrained would take it for a float layer"),
}


@pytest.mark.parametrize("case", UNSAVED)
def test_what_could_not_be_loaded_is_not_saved(case: str, wide: Path, tmp_path: Path) -> None:
    make, message = UNSAVED[case]
    model = make(wide)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_bitsandbytes_is_forgotten_when_its_last_layer_is_gone(wide: Path) -> None:
    model = mebp.replace_linears(with_bitsandbytes(wide), exclude_modules=["q_proj"])
    assert model.is_loaded_in_4bit and is_linear4bit(model.model.layers[0].self_attn.q_proj)
    mebp.replace_linears(model)
    assert not [name for name in vars(model) if "quantiz" in name and name != "hf_quantizer" or "4bit" in name]
    assert not [name for name in vars(model.config) if "quantiz" in name]
    assert model.num_parameters() > 0 and type(model.hf_quantizer) is quantizer.Int4Quantizer


# --- training -------------------------------------------------------------------------------------------------------


def adapted(model: Any, seed: int = 3) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    randomize_adapter(wrapped, seed)
    return wrapped


def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(**batch())
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients and all(gradient is not None for gradient in gradients.values())
    return out.logits.detach(), gradients


@pytest.mark.parametrize(("architecture", "scheme"), [("llama", "symmetric"), ("gpt2", "affine"), ("opt", "codebook")])
def test_gradients_equal_those_of_the_decoded_model_in_float64(
    architecture: str, scheme: Any, shared_store: Any
) -> None:
    source = shared_store(architecture).parent / "model"
    model = quantized(source, scheme=scheme)
    exact, expected = run(adapted(decoded_twin(source, model, torch.float64)).double())
    found, gradients = run(adapted(model))
    assert relative_rms(found, exact) < 1e-5
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_rms(gradient, expected[name]) < 1e-5, name


def test_bfloat16_is_as_near_to_float64_as_a_float_model_is(source: Path) -> None:
    model = quantized(source, torch.bfloat16)
    peer = decoded_twin(source, model, torch.bfloat16)
    # The truth: unrounded decoded weights, and the rest as both have it.
    truth = decoded_twin(source, model, torch.float64)
    kept = {name: p for name, p in peer.named_parameters() if name.rpartition(".")[0] not in int4_layers(model)}
    truth.load_state_dict(kept, strict=False)
    exact, expected = run(adapted(truth).double())
    found, gradients = run(adapted(model))
    peer_logits, peer_gradients = run(adapted(peer))
    assert relative_rms(found, exact) < 1.2 * relative_rms(peer_logits, exact)
    total, peer_total = (
        sum(relative_rms(g, expected[name]) for name, g in x.items()) for x in (gradients, peer_gradients)
    )
    assert total < 1.2 * peer_total


def test_a_peft_adapter_trains_to_the_losses_of_the_decoded_model(source: Path, tmp_path: Path) -> None:
    model = quantized(source)
    options = {"per_device_train_batch_size": 2, "save_strategy": "no"}
    jobs = [
        make_trainer(adapted(base), tmp_path / "run", **options)
        for base in (decoded_twin(source, model, torch.float32), model)
    ]
    for job in jobs:
        job.train()
    losses = [history(job, "loss") for job in jobs]
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # Trainer saves the adapter alone, and it fits the model that is quantized again.
    jobs[1].save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(quantized(source), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(jobs[1].model))


def test_pefts_layers_are_ours(source: Path, model: Any) -> None:
    """Nobody has to call ``register_peft``."""
    around = adapted(quantized(source))
    assert sum(type(module).__name__ == "PeftInt4Linear" for module in around.modules()) == 21
    with pytest.raises(NotImplementedError, match="an int4 weight cannot take an adapter in"):
        around.merge_and_unload()
    with pytest.raises(ValueError, match="does not support use_dora=True"):
        config = peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
        peft.get_peft_model(copy.deepcopy(model), config)


def test_trainer_wants_adapters(source: Path, tmp_path: Path) -> None:
    model = quantized(source)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        make_trainer(model, tmp_path)
    model.requires_grad_(False)
    ours = Int4LoRALinear(model.get_submodule(UP).int4(), None, torch.float32, rank=4, scaling=2.0)
    model.model.layers[1].mlp.up_proj = ours
    make_trainer(model, tmp_path, max_steps=1, save_strategy="no").train()
    assert ours.lora_B.abs().max() > 0
    with pytest.raises(ValueError, match=f"{UP} has an adapter, .* use save_adapter"):
        model.save_pretrained(tmp_path / "saved")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_name_that_matches_no_module(source: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no module 'q_porj'"):
        quantized(source, modules_to_not_convert=["q_porj"])


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
        quantized(edited(source, tmp_path / "broken", {f"{UP}.weight": weight}))


@pytest.mark.parametrize("name", ["scales", "weight"])
def test_tensors_that_are_missing(saved: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"the checkpoint lacks {UP}.{name}"):
        from_pretrained(edited(saved, tmp_path / "broken", {f"{UP}.{name}": None}))


def test_experts_that_were_layers_of_their_own(tmp_path: Path) -> None:
    """transformers 4 saves a mixture so. transformers 5 joins the experts, and has no place for their int4 weights."""
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    size = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(MixtralConfig(**size, **changes)).save_pretrained(tmp_path / "float")
    quantized(tmp_path / "float").save_pretrained(tmp_path / "int4")
    names = [f"model.layers.0.block_sparse_moe.experts.{n}.w{w}" for n in range(4) for w in (1, 2, 3)]
    tensors = {f"{name}.weight": torch.zeros(64, 32, dtype=torch.uint8) for name in names}
    tensors |= {f"{name}.scales": torch.zeros(2, 128, dtype=torch.uint8) for name in names}
    mixture = edited(tmp_path / "int4", tmp_path / "mixture", tensors)
    if quantizer.BEFORE_5:
        assert f"{names[0]}" in int4_layers(from_pretrained(mixture))
        return
    found = r"experts\.\d\.w\d is an int4 layer, and a part of model.layers.0.mlp.experts in transformers 5"
    with pytest.raises(ValueError, match=found):
        from_pretrained(mixture)


def test_scales_that_were_tampered_with(saved: Path, tmp_path: Path) -> None:
    scales = load_file(saved / "model.safetensors")[f"{UP}.scales"]
    short = edited(saved, tmp_path / "short", {f"{UP}.scales": scales[:, :-2].contiguous()})
    with pytest.raises(RuntimeError, match="size"):
        from_pretrained(short)
    with pytest.raises((ValueError, RuntimeError), match=f"the checkpoint lacks {UP}.scales|size mismatch"):
        AutoModelForCausalLM.from_pretrained(short, ignore_mismatched_sizes=True)
    wild = edited(saved, tmp_path / "wild", {f"{UP}.scales": torch.full_like(scales, 255)})
    with pytest.raises(ValueError, match=f"{UP}.scales is not finite"):
        from_pretrained(wild)


def test_a_config_that_was_tampered_with(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\..*minimum"):
        from_pretrained(edited(saved, tmp_path / "affine", config={"scheme": "affine"}))
    with pytest.raises(RuntimeError, match="size"):
        from_pretrained(edited(saved, tmp_path / "groups", config={"group_size": 64}))
    with pytest.raises(ValueError, match="is not a setting of Int4Config"):
        from_pretrained(edited(saved, tmp_path / "more", config={"color": 4}))
    with pytest.raises(RuntimeError, match="size"):
        from_pretrained(edited(saved, tmp_path / "width", config={"bits": 8}))


def test_without_the_method_the_directory_is_not_read_as_float(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not imported the plug-in does not know the method."""
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "mebp_int4")
    with pytest.raises(RuntimeError, match="size"):
        from_pretrained(saved)


def test_whoever_imports_the_settings_registers_the_method(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documentation says that a process which loads such a directory has to import ``Int4Config``."""
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "mebp_int4")
    monkeypatch.delitem(sys.modules, quantizer.__name__)
    assert mebp.Int4Config is Int4Config and "mebp_int4" in auto.AUTO_QUANTIZER_MAPPING
    assert int4_layers(from_pretrained(saved))


def test_layers_whose_weight_is_read_stay_float(tmp_path, monkeypatch):
    """Mamba's mixers read weights themselves. A model that was saved before this was heeded loads as it was saved."""

    def mixer(model):
        return {name for name, part in model.backbone.layers[0].mixer.named_children() if isinstance(part, Int4Linear)}

    source, ids = save_tiny_model("mamba", tmp_path / "model"), torch.arange(3, 15)[None]
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=Int4Config(group_size=32))
    model.save_pretrained(tmp_path / "int4")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    assert mixer(model) == mixer(again) == {"in_proj"}
    assert torch.equal(again(ids).logits, model(ids).logits)
    with monkeypatch.context() as patch:
        patch.setattr(model_layers, "directly_read", lambda model: set())
        older = AutoModelForCausalLM.from_pretrained(source, quantization_config=Int4Config(group_size=32))
        older.save_pretrained(tmp_path / "older")
    assert mixer(AutoModelForCausalLM.from_pretrained(tmp_path / "older")) == mixer(older) > {"in_proj"}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_are_models_of_their_own(source: Path, copied: Any) -> None:
    model = peft.get_peft_model(quantized(source), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomize_adapter(model)
    twin = copied(model)
    expected = logits(model)
    assert_same_codes(twin, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)
    inner = twin.get_base_model()
    assert inner.hf_quantizer.model() is inner
    twin(**batch()).loss.backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())
