"""A loaded model's linear layers become int4: exactly, one at a time, and nothing else of the model changes."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from int4_models import decoded_twin, from_pretrained, logits, quantized, with_bitsandbytes
from models import batch, randomize_adapter, relative_rms
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.pytorch_utils import Conv1D

import mebp_triton as mebp
from mebp_triton.huggingface.quantizer import BEFORE_5
from mebp_triton.kernels.names import DEFAULT_FORM
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.linear import Int4Linear, Int4LoRALinear
from mebp_triton.models.adapter import PREFIX, adapter_layers

LORA = mebp.LoraConfig(r=4, lora_alpha=6)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # sizes that bitsandbytes can quantize


@pytest.fixture(scope="module")
def sources(shared_store: Any) -> dict[str, Path]:
    stores = {name: shared_store(name) for name in ("gpt2", "opt")} | {"llama": shared_store("llama", config=WIDE)}
    return {name: store.parent / "model" for name, store in stores.items()}


def loaded(source: Path, quant_type: str | None = None) -> Any:
    return from_pretrained(source) if quant_type is None else with_bitsandbytes(source, quant_type)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.eval().zero_grad()
    model(**batch(), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("architecture", "quant_type", "bits"),
    [("gpt2", None, 4), ("opt", None, 4), ("llama", "nf4", 4), ("llama", "fp4", 4), ("gpt2", None, 8)],
)
def test_gradients_against_peft_in_float64(
    architecture: str, quant_type: str | None, bits: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Conv1D, Linear with bias, NF4, FP4, 8 bits: the whole model's loss and LoRA gradients, in float64 and float32."""
    source = sources[architecture]
    model = mebp.replace_linears(loaded(source, quant_type).train(), LORA, group_size=32, bits=bits)
    assert model.training and not any(isinstance(m, Conv1D) for m in model.modules())
    randomize_adapter(model)
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    mebp.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        decoded_twin(source, model, torch.float64), tmp_path, is_trainable=True, autocast_adapter_dtype=False
    ).double()
    truth = {name.replace(".default.weight", ""): grad for name, grad in gradients(theirs).items()}
    for kind, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        found = {PREFIX + name: grad for name, grad in gradients(model.to(kind)).items()}
        assert found.keys() == truth.keys() and len(found) > 20
        assert max(relative_rms(found[name], truth[name]) for name in truth) < tolerance


def test_the_quantised_weight_is_quantizes_own(sources: dict[str, Path]) -> None:
    plain = from_pretrained(sources["gpt2"])
    options = {"scheme": "affine", "group_size": 16, "scale_search": False, "bits": 8}
    model = mebp.replace_linears(from_pretrained(sources["gpt2"]), **options)
    name = "transformer.h.1.mlp.c_proj"
    expected = quantize_matrix(plain.get_submodule(name).weight.detach().t(), **options)[0]
    found = model.get_submodule(name)
    assert type(found) is Int4Linear and torch.equal(decode(found.int4()), decode(expected))
    assert torch.equal(found.bias, plain.get_submodule(name).bias)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.transformer.wte.weight


def test_each_matrix_is_freed_before_the_next_is_read(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for quant_type in (None, "nf4"):
        model = loaded(sources["llama"], quant_type)
        old = [weakref.ref(m.weight) for n, m in model.model.named_modules() if n.endswith("_proj")]
        alive: list[int] = []
        original = Int4Linear.__init__

        def counted(self: Any, *args: Any, old: Any = old, alive: Any = alive, original: Any = original) -> None:
            alive.append(sum(reference() is not None for reference in old))
            original(self, *args)

        gc.collect()
        gc.disable()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Int4Linear, "__init__", counted)
                mebp.replace_linears(model)
            assert not any(reference() is not None for reference in old)
        finally:
            gc.enable()
        assert alive == list(range(len(old), 0, -1)) and len(old) == 21


def test_an_encoder_decoder_runs_with_its_heads_and_float32_layers() -> None:
    t5 = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    translator = mebp.replace_linears(AutoModelForSeq2SeqLM.from_config(t5))
    kinds = {name: type(m) for name, m in translator.named_modules() if isinstance(m, nn.Linear)}
    assert {name.split(".")[-1] for name, kind in kinds.items() if kind is nn.Linear} == {"wo", "lm_head"}
    assert sum(kind is Int4Linear for kind in kinds.values()) == 14
    ids = batch(2, 6, None)["input_ids"]
    assert torch.isfinite(translator(input_ids=ids, decoder_input_ids=ids).logits).all()


def test_a_classifier_is_trained_by_peft_and_its_freezing_is_said(sources: dict[str, Path], tmp_path: Path) -> None:
    def classifier(seed: int) -> Any:
        torch.manual_seed(seed)  # of the head, which the files of a language model lack
        return transformers.AutoModelForSequenceClassification.from_pretrained(sources["llama"], num_labels=3)

    with pytest.warns(UserWarning, match=r"score of Llama.* stays frozen, .* peft\.get_peft_model with task_type"):
        mebp.replace_linears(classifier(0), LORA)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(mebp.replace_linears(classifier(1)), config).eval()
    ids = batch(1, 9, None)["input_ids"]
    model(input_ids=ids).logits.sum().backward()
    assert any("score" in name for name, p in model.named_parameters() if p.grad is not None)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(mebp.replace_linears(classifier(2)), tmp_path).eval()
    assert torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("excluded", "kept", "with_peft"),
    [
        (
            ["k_proj", "layers.0.mlp.up_proj"],
            {"layers.0.mlp.up_proj"} | {f"layers.{n}.self_attn.k_proj" for n in range(3)},
            True,
        ),
        ("mlp", {f"layers.{n}.mlp.{name}_proj" for n in range(3) for name in ("up", "gate", "down")}, False),
        (("model.layers.1.self_attn",), {f"layers.1.self_attn.{name}_proj" for name in "qkvo"}, True),
    ],
)
def test_excluding_is_that_of_int4_config(
    excluded: Any, kept: set[str], with_peft: bool, sources: dict[str, Path]
) -> None:
    model = from_pretrained(sources["llama"])
    around = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")) if with_peft else model
    mebp.replace_linears(around, exclude_modules=excluded)
    layers = {name: m for name, m in model.model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name}
    assert {name.replace(".base_layer", "") for name, m in layers.items() if type(m) is nn.Linear} == kept
    theirs = quantized(sources["llama"], modules_to_not_convert=excluded)
    assert {name for name, m in theirs.model.named_modules() if type(m) is nn.Linear} == kept


def test_what_transformers_keeps_in_float32_stays_float(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modelling code reads the dtype of such weights (DeepSeek's indexers), and would cast activations to bytes."""
    parts = ["o_proj", "gate_proj"] if BEFORE_5 else ["self_attn.o_proj", "gate_proj.weight"]
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", parts)
    wanted = {f"layers.{n}.{name}_proj" for n in range(3) for name in ("self_attn.o", "mlp.gate")}
    replaced = mebp.replace_linears(from_pretrained(sources["llama"]), LORA)
    around = peft.get_peft_model(from_pretrained(sources["llama"]), peft.LoraConfig(r=2, target_modules="all-linear"))
    under_peft = mebp.replace_linears(around).get_base_model()
    for model in (replaced, quantized(sources["llama"]), under_peft):
        layers = {n: m for n, m in model.model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n}
        assert {name.replace(".base_layer", "") for name, m in layers.items() if type(m) is nn.Linear} == wanted
        assert sum(isinstance(m, Int4Linear) for m in layers.values()) == 15


def test_routers_stay_float(tmp_path: Path) -> None:
    """transformers 5 has a class of its own for them, transformers 4 linear layers; Jamba's are linear in both."""
    size = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(**size, **heads, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixtral")
    settings = mebp.Int4Config()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral", quantization_config=settings)
    replaced = mebp.replace_linears(from_pretrained(tmp_path / "mixtral"))
    for model in (loaded, replaced):
        routers = [m for name, m in model.named_modules() if name.endswith(".gate")]
        assert len(routers) == 2 and all(m.weight.dtype == torch.float32 for m in routers)
        assert sum(isinstance(m, Int4Linear) for m in model.modules()) >= 8
    assert torch.equal(logits(loaded), logits(replaced))
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(loaded))
    model = mebp.replace_linears(nn.ModuleDict({"router": nn.Linear(64, 4), "up": nn.Linear(64, 64)}))
    assert type(model["router"]) is nn.Linear and type(model["up"]) is Int4Linear


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(64, 64)
    model = mebp.replace_linears(nn.Sequential(shared, nn.ReLU(), shared), mebp.LoraConfig(r=2))
    assert model[0] is model[2] and type(model[0]) is Int4LoRALinear
    assert model[0].training


def test_save_pretrained_with_our_adapters_writes_the_adapter(sources: dict[str, Path], tmp_path: Path) -> None:
    model = mebp.replace_linears(from_pretrained(sources["llama"]), LORA)
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "ours")
    again = mebp.replace_linears(from_pretrained(sources["llama"]), LORA)
    mebp.load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    # Trainer reads this file when it resumes.
    other = mebp.replace_linears(from_pretrained(sources["llama"]), LORA)
    missing = other.load_state_dict(load_file(tmp_path / "ours" / "model.safetensors"), strict=False)
    assert not missing.missing_keys and torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q_proj|gate_proj)", "all-linear"])
def test_the_files_name_the_adapted_layers(
    targets: Any, sources: dict[str, Path], shared_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that were excluded, or that transformers keeps in float32, are not named."""
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", ["gate_proj"])
    config = mebp.LoraConfig(r=2, target_modules=targets)
    model = mebp.replace_linears(
        from_pretrained(sources["llama"]), config, exclude_modules=["layers.0.self_attn.q_proj"]
    )
    randomize_adapter(model)
    mebp.save_adapter(model, tmp_path / "adapter")
    monkeypatch.undo()
    read = mebp.read_adapter_config(tmp_path / "adapter")
    for other in (
        mebp.replace_linears(from_pretrained(sources["llama"]), read),
        mebp.load(shared_store("llama", config=WIDE), read),
    ):
        mebp.load_adapter(other, tmp_path / "adapter")
        assert adapter_layers(other).keys() == adapter_layers(model).keys()
    theirs = peft.PeftModel.from_pretrained(from_pretrained(sources["llama"]), tmp_path / "adapter")
    found = {name for name, m in theirs.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert found == adapter_layers(model).keys()


@pytest.mark.parametrize("trainable", [False, True])
def test_what_peft_trains_whole_stays_float(trainable: bool, sources: dict[str, Path], tmp_path: Path) -> None:
    """This holds where it is not trained at the moment, and for the original, which the next adapter gets a copy of."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"], task_type="CAUSAL_LM")
    first = peft.get_peft_model(from_pretrained(sources["llama"]), config)
    randomize_adapter(first)
    first.save_pretrained(tmp_path / "first")
    model = peft.PeftModel.from_pretrained(
        from_pretrained(sources["llama"]), tmp_path / "first", is_trainable=trainable
    )
    if trainable:
        model.add_adapter("second", config)
        model.set_adapter("second")
    before = {n: p for n, p in model.named_parameters() if "down_proj" in n}
    mebp.replace_linears(model)
    after = {n: p for n, p in model.named_parameters() if "down_proj" in n}
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert sum(type(m) is Int4Linear for m in model.modules()) == 18
    model.add_adapter("third", config)
    model.set_adapter("third")
    model(**batch()).loss.backward()
    model.save_pretrained(tmp_path / "again")
    name = "base_model.model.model.layers.0.mlp.down_proj.weight"
    files = [load_file(tmp_path / root / "adapter_model.safetensors") for root in ("first", "again")]
    assert files[1].keys() == files[0].keys() and torch.equal(files[1][name], files[0][name])


@pytest.mark.parametrize("lora", [None, LORA])
def test_hooks_stay(lora: Any) -> None:
    layer, seen = nn.Linear(64, 64), []
    layer.register_forward_pre_hook(lambda m, args: seen.append("before"))
    handle = layer.register_forward_hook(lambda m, args, y: seen.append("after") or y * 2)
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    model = mebp.replace_linears(nn.Sequential(layer), lora)
    assert model[0] is layer and isinstance(layer, Int4LoRALinear if lora else Int4Linear)
    x = torch.randn(2, 64, requires_grad=True)
    y = model(x)
    y.sum().backward()
    weight = decode(layer.int4(), torch.float32)
    assert seen == ["before", "after", "backward"] and isinstance(layer._hf_hook, AlignDevicesHook)
    assert relative_rms(y, 2 * (x @ weight.t() + layer.bias)) < 1e-5
    assert relative_rms(x.grad, 2 * torch.ones(2, 64) @ weight) < 1e-5
    handle.remove()
    assert relative_rms(model(x), y / 2) < 1e-6


def test_data_parallel_does_not_send_frozen_weights(sources: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    models = [
        mebp.replace_linears(from_pretrained(sources["llama"]), LORA),
        peft.get_peft_model(mebp.replace_linears(from_pretrained(sources["llama"])), config),
        mebp.replace_linears(peft.get_peft_model(from_pretrained(sources["llama"]), config)),
        peft.get_peft_model(quantized(sources["llama"]), config),
    ]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for model in models:
            parallel = nn.parallel.DistributedDataParallel(model)
            sent = [name for name, _ in parallel.named_module_buffers.items()]
            assert not [name for name in sent if name.endswith(("scales", "minimum", "codebook"))]
            int4 = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Int4Linear)}
            assert len(int4) == 21 and int4 <= parallel.parameters_to_ignore
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_pefts_adapters_are_taken_over(quant_type: str | None, sources: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        exclude_modules=["k_proj"],
        rank_pattern={"down_proj": 2},
        lora_dropout=0.25,
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(loaded(sources["llama"], quant_type), config)
    randomize_adapter(theirs)
    before = dict(theirs.named_parameters())
    trainable = {name for name, parameter in before.items() if parameter.requires_grad}
    expected = logits(copy_of_decoded(theirs)) if quant_type is None else None
    ours = mebp.replace_linears(theirs)
    assert ours is theirs
    after = dict(ours.named_parameters())
    assert {name for name, parameter in after.items() if parameter.requires_grad} == trainable
    assert all(after[name] is before[name] for name in trainable)
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, mebp.PeftInt4Linear)}
    assert len(layers) == 18 and all(type(layer.base_layer) is Int4Linear for layer in layers.values())
    assert len([n for n, m in ours.named_modules() if n.endswith("k_proj") and type(m) is Int4Linear]) == 3
    assert type(ours.get_submodule("base_model.model.lm_head.modules_to_save.default")) is nn.Linear
    layer = layers["base_model.model.model.layers.0.mlp.down_proj"]
    assert layer.r["default"] == 2 and layer.lora_dropout["default"].p == 0.25
    if expected is not None:
        assert relative_rms(logits(ours), expected) < 1e-5
    mebp.replace_linears(ours)  # changes nothing
    now = logits(ours)
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(mebp.replace_linears(loaded(sources["llama"], quant_type)), tmp_path)
    assert torch.equal(logits(again), now)


def test_adapters_that_transformers_put_in(sources: dict[str, Path]) -> None:
    """``model.add_adapter`` of transformers itself, without a ``PeftModel`` around it."""
    model = with_bitsandbytes(sources["llama"])
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    mebp.replace_linears(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert sum(isinstance(module, mebp.PeftInt4Linear) for module in model.modules()) == 3
    assert sum(type(module) is Int4Linear for module in model.modules()) == 21


def copy_of_decoded(model: Any) -> Any:
    """A float PEFT model whose frozen weights are rounded as they will be."""
    other = copy.deepcopy(model)
    for name, module in other.named_modules():
        if type(module) is nn.Linear and not module.weight.requires_grad and "lora_" not in name and "head" not in name:
            module.weight.data = decode(quantize_matrix(module.weight.data, *DEFAULT_FORM[:2])[0], torch.float32)
    return other


def test_saved_and_loaded_again(sources: dict[str, Path], tmp_path: Path) -> None:
    config = mebp.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_proj"], use_rslora=True)
    model = mebp.replace_linears(from_pretrained(sources["gpt2"]), config, seed=5)
    randomize_adapter(model)
    mebp.save_adapter(model, tmp_path)
    read = mebp.read_adapter_config(tmp_path)
    assert (read.r, read.lora_alpha, read.use_rslora) == (3, 5, True)
    again = mebp.replace_linears(
        from_pretrained(sources["gpt2"]), mebp.LoraConfig(r=3, target_modules=read.target_modules)
    )
    mebp.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.mebp_lora.lora_alpha == 5
    # PEFT reads it over the float model; it knows the base by name.
    assert '"task_type": "CAUSAL_LM"' in (tmp_path / "adapter_config.json").read_text()
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == str(sources["gpt2"])
    with pytest.raises(ValueError, match="no adapter of ours to save"):
        mebp.save_adapter(mebp.replace_linears(from_pretrained(sources["gpt2"])), tmp_path / "none")
    net = mebp.replace_linears(nn.Sequential(nn.Linear(32, 8)), mebp.LoraConfig(r=2))
    mebp.save_adapter(net, tmp_path / "net")
    assert peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(32, 8)), tmp_path / "net") is not None


def test_the_seed_and_the_dtype_of_adapters() -> None:
    def first(**options: Any) -> torch.Tensor:
        return mebp.replace_linears(nn.Sequential(nn.Linear(64, 8)), mebp.LoraConfig(r=2), **options)[0].lora_A

    assert torch.equal(first(), first()) and not torch.equal(first(), first(seed=1))
    assert first(adapter_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_moving_a_model_leaves_the_weights_bits() -> None:
    model = mebp.replace_linears(nn.Sequential(bitsandbytes.nn.Linear4bit(64, 8).to("cpu")))
    before = decode(model[0].int4())
    for change in (torch.float16, torch.bfloat16, torch.float64):
        model.to(change)
        assert torch.equal(decode(model[0].int4()), before) and model[0].bias.dtype == change
    assert model.to("meta")[0].int4().device.type == "meta"


def of_another_quantizer(sources: dict[str, Path]) -> Any:
    model = from_pretrained(sources["llama"])
    model.hf_quantizer = SimpleNamespace(quantization_config=transformers.QuantoConfig(weights="int8"))
    return model


def another_forward(sources: dict[str, Path]) -> Any:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].forward = lambda x: x
    return model


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing to do": (lambda s: nn.Sequential(nn.ReLU()), {}, "has no linear layer to replace"),
    "all excluded": (lambda s: nn.Sequential(nn.Linear(8, 8)), {"exclude_modules": ["0"]}, "no linear layer"),
    "a typo": (
        lambda s: from_pretrained(s["llama"]),
        {"lora": mebp.LoraConfig(target_modules=["q_prj"])},
        "'q_prj' matches no",
    ),
    "scheme": (lambda s: from_pretrained(s["llama"]), {"scheme": "nf4"}, "scheme must be one of"),
    "bits": (lambda s: from_pretrained(s["llama"]), {"bits": 16}, "bits must be one of 4, 8"),
    "group size": (lambda s: from_pretrained(s["llama"]), {"group_size": 48}, "group_size must be one of"),
    "backend": (lambda s: from_pretrained(s["llama"]), {"backend": "cuda"}, "backend must be one of"),
    "adapter dtype": (lambda s: from_pretrained(s["llama"]), {"adapter_dtype": torch.float16}, "adapter_dtype must be"),
    "lora": (lambda s: from_pretrained(s["llama"]), {"lora": 8}, "lora must be a LoraConfig"),
    "meta": (lambda s: nn.Sequential(nn.Linear(8, 8, device="meta")), {}, "0 has no weight in memory"),
    "float64": (lambda s: nn.Sequential(nn.Linear(8, 8).double()), {}, "0: weights of torch.float64"),
    "another kind": (
        lambda s: nn.Sequential(nn.Linear(8, 8), bitsandbytes.nn.Linear8bitLt(8, 8)),
        {},
        "1 is a bitsandbytes.*Linear8bitLt, which cannot be replaced; name it in exclude_modules",
    ),
    "narrow bitsandbytes": (
        lambda s: nn.Sequential(nn.Linear(8, 8), bitsandbytes.nn.Linear4bit(48, 8).to("cpu")),
        {},
        "1: in_features=48 is not a multiple of 32",
    ),
    "a name of no module": (
        lambda s: from_pretrained(s["llama"]),
        {"exclude_modules": ["mlp", "q_prj"]},
        "has no module 'q_prj'",
    ),
    "a model of load": (
        lambda s: mebp.load(s["llama"].parent / "store"),
        {"lora": mebp.LoraConfig(r=2)},
        r"LlamaForCausalLM comes from load: give it the lora there",
    ),
    "another quantizer": (of_another_quantizer, {}, "LlamaForCausalLM is quantised by quanto already"),
    "another forward": (another_forward, {}, "1: something stands in the place of its forward"),
    "a weight that is computed": (
        lambda s: nn.Sequential(nn.Linear(8, 8), nn.utils.spectral_norm(nn.Linear(8, 8))),
        {},
        "1: its weight is computed from others",
    ),
    "twice": (
        lambda s: mebp.replace_linears(nn.Sequential(nn.Linear(8, 8)), mebp.LoraConfig(r=2)),
        {"lora": mebp.LoraConfig(r=2)},
        "0 is int4 and has its adapter already",
    ),
    "PEFT and lora": (
        lambda s: peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"])),
        {"lora": mebp.LoraConfig(r=2)},
        "has adapters of PEFT already: leave out lora",
    ),
    "DoRA": (
        lambda s: peft.get_peft_model(
            nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], use_dora=True)
        ),
        {},
        "'default' is a variant of LoRA",
    ),
    "not finite": (lambda s: nn.Sequential(broken()), {}, "0: weight must be finite"),
}


def broken() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.weight.data[3, 2] = torch.nan
    return layer


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_changes_nothing(case: str, sources: dict[str, Path]) -> None:
    make, options, message = WRONG[case]
    model = make(sources)
    before = {name: (m, type(m)) for name, m in model.named_modules()}
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    flags = {name: tensor.requires_grad for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=message) as caught:
        mebp.replace_linears(model, **options)
    assert "\n" not in str(caught.value)
    assert {name: (m, type(m)) for name, m in model.named_modules()} == before
    now = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    assert all(now[name] is tensor and now[name].requires_grad == flags[name] for name, tensor in tensors.items())
