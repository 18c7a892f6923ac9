"""A loaded model's linear layers become int4: exactly, one at a time, and nothing else of the model changes."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from models import batch, randomize_adapter, relative_rms, save_tiny_model, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import mebp_triton as mebp
from mebp_triton.adapter import PREFIX
from mebp_triton.kernels.reference import decode
from mebp_triton.lora import Int4Linear, Int4LoRALinear
from mebp_triton.quantization import quantize_matrix

LORA = mebp.LoraConfig(r=4, lora_alpha=6)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    return {
        "gpt2": save_tiny_model("gpt2", root / "gpt2"),
        "opt": save_tiny_model("opt", root / "opt"),
        "llama": save_tiny_model("llama", root / "llama", **wide),
    }


def load(source: Path, quant_type: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    options: dict[str, Any] = {}
    if quant_type is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).train()


@torch.no_grad()
def decoded(source: Path, model: Any) -> Any:
    """transformers' own model in float64 with the decoded weights of ``model``."""
    truth = load(source).double()
    named = dict(model.named_modules())
    for name, module in truth.named_modules():
        if isinstance(named.get(name), Int4Linear):
            weight = decode(named[name].int4())
            module.weight.copy_(weight.t() if isinstance(module, Conv1D) else weight)
    return truth


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.eval().zero_grad()
    model(**batch(), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(2, 12, None)["input_ids"]).logits


@pytest.mark.parametrize(
    ("architecture", "quant_type"), [("gpt2", None), ("opt", None), ("llama", "nf4"), ("llama", "fp4")]
)
def test_gradients_against_peft_in_float64(
    architecture: str, quant_type: str | None, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Conv1D, Linear with bias, NF4 and FP4: the whole model's loss and LoRA gradients, in float64 and float32."""
    source = sources[architecture]
    model = mebp.replace_linears(load(source, quant_type), LORA, group_size=32)
    assert model.training and not any(isinstance(m, Conv1D) for m in model.modules())
    randomize_adapter(model)
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    mebp.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        decoded(source, model), tmp_path, is_trainable=True, autocast_adapter_dtype=False
    ).double()
    truth = {name.replace(".default.weight", ""): grad for name, grad in gradients(theirs).items()}
    for kind, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        found = {PREFIX + name: grad for name, grad in gradients(model.to(kind)).items()}
        assert found.keys() == truth.keys() and len(found) > 20
        assert max(relative_rms(found[name], truth[name]) for name in truth) < tolerance


def test_the_quantised_weight_is_quantizes_own(sources: dict[str, Path]) -> None:
    plain = load(sources["gpt2"])
    options = {"scheme": "affine", "group_size": 32, "scale_search": False}
    model = mebp.replace_linears(load(sources["gpt2"]), **options)
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
        model = load(sources["llama"], quant_type)
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


def test_what_stays_float(sources: dict[str, Path]) -> None:
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    assert type(mebp.replace_linears(classifier).score) is nn.Linear
    t5 = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    translator = mebp.replace_linears(AutoModelForSeq2SeqLM.from_config(t5))
    kinds = {name: type(m) for name, m in translator.named_modules() if isinstance(m, nn.Linear)}
    assert {name.split(".")[-1] for name, kind in kinds.items() if kind is nn.Linear} == {"wo", "lm_head"}
    assert sum(kind is Int4Linear for kind in kinds.values()) == 14
    ids = batch(2, 6, None)["input_ids"]
    assert torch.isfinite(translator(input_ids=ids, decoder_input_ids=ids).logits).all()
    for excluded in (["k_proj", "layers.0.mlp.up_proj"], r".*\.k_proj|.*\.0\.mlp\.up_proj"):
        model = mebp.replace_linears(load(sources["llama"]), exclude_modules=excluded)
        kept = sorted(name for name, m in model.model.named_modules() if type(m) is nn.Linear)
        assert kept == ["layers.0.mlp.up_proj", *(f"layers.{index}.self_attn.k_proj" for index in range(3))]


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(64, 64)
    model = mebp.replace_linears(nn.Sequential(shared, nn.ReLU(), shared), mebp.LoraConfig(r=2))
    assert model[0] is model[2] and type(model[0]) is Int4LoRALinear
    assert model[0].training


def test_bitsandbytes_is_forgotten(sources: dict[str, Path], tmp_path: Path) -> None:
    model = mebp.replace_linears(load(sources["llama"], "nf4"), LORA)
    assert not [name for name in vars(model) if "quant" in name or "4bit" in name]
    assert not [name for name in vars(model.config) if "quantiz" in name]
    assert model.num_parameters() > 0
    half = load(sources["llama"], "nf4")
    mebp.replace_linears(half, exclude_modules=["q_proj"])
    assert half.is_loaded_in_4bit and isinstance(half.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear4bit)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


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
    theirs = peft.get_peft_model(load(sources["llama"], quant_type), config)
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
    again = peft.PeftModel.from_pretrained(mebp.replace_linears(load(sources["llama"], quant_type)), tmp_path)
    assert torch.equal(logits(again), now)


def test_adapters_that_transformers_put_in(sources: dict[str, Path]) -> None:
    """``model.add_adapter`` of transformers itself, without a ``PeftModel`` around it."""
    model = load(sources["llama"], "nf4")
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
            module.weight.data = decode(quantize_matrix(module.weight.data)[0], torch.float32)
    return other


def test_pefts_own_layer_over_int4_becomes_the_fused_one() -> None:
    layer = Int4Linear(quantize_matrix(torch.randn(8, 64))[0], None, torch.float32)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 64), layer), peft.LoraConfig(target_modules=["1"]))
    model.base_model.model[1] = stock = peft.tuners.lora.Linear(layer, "default", **stock_arguments())
    mebp.replace_linears(model)
    assert model.base_model.model[1] is stock and isinstance(stock, mebp.PeftInt4Linear)
    assert stock.base_layer is layer


def stock_arguments() -> dict[str, Any]:
    if "config" in inspect.signature(peft.tuners.lora.Linear.__init__).parameters:
        return {"r": 4, "lora_alpha": 4, "config": peft.LoraConfig(r=4)}
    return {"r": 4, "lora_alpha": 4}


def test_saved_and_loaded_again(sources: dict[str, Path], tmp_path: Path) -> None:
    config = mebp.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_proj"], use_rslora=True)
    model = mebp.replace_linears(load(sources["gpt2"]), config, seed=5)
    randomize_adapter(model)
    mebp.save_adapter(model, tmp_path)
    read = mebp.read_adapter_config(tmp_path)
    assert (read.r, read.lora_alpha, read.use_rslora) == (3, 5, True)
    again = mebp.replace_linears(load(sources["gpt2"]), mebp.LoraConfig(r=3, target_modules=read.target_modules))
    mebp.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.mebp_lora.lora_alpha == 5
    # PEFT reads it over the float model; it knows the base by name.
    assert '"task_type": "CAUSAL_LM"' in (tmp_path / "adapter_config.json").read_text()
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == str(sources["gpt2"])
    with pytest.raises(ValueError, match="no adapter of ours to save"):
        mebp.save_adapter(mebp.replace_linears(load(sources["gpt2"])), tmp_path / "none")
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


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing to do": (lambda s: nn.Sequential(nn.ReLU()), {}, "has no linear layer to replace"),
    "all excluded": (lambda s: nn.Sequential(nn.Linear(8, 8)), {"exclude_modules": ["0"]}, "no linear layer"),
    "a typo": (lambda s: load(s["llama"]), {"lora": mebp.LoraConfig(target_modules=["q_prj"])}, "'q_prj' matches no"),
    "scheme": (lambda s: load(s["llama"]), {"scheme": "nf4"}, "scheme must be one of"),
    "group size": (lambda s: load(s["llama"]), {"group_size": 48}, "group_size must be one of"),
    "backend": (lambda s: load(s["llama"]), {"backend": "cuda"}, "backend must be one of"),
    "adapter dtype": (lambda s: load(s["llama"]), {"adapter_dtype": torch.float16}, "adapter_dtype must be"),
    "lora": (lambda s: load(s["llama"]), {"lora": 8}, "lora must be a LoraConfig"),
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
        "1: in_features=48 is no multiple of 32",
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


def test_merged_adapters_are_refused() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged; call unmerge_adapter"):
        mebp.replace_linears(model)
