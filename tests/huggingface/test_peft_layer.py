"""PEFT makes our fused layer of our frozen one; everything else about it is PEFT's."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import batch, randomize_adapter, relative_rms, save_tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import mebp_triton as mebp
from mebp_triton.huggingface import peft_layer
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.linear import Int4Linear


def lora_config(**changes: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["net"]} | changes))


class Net(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def frozen(bias: bool = True) -> Int4Linear:
    generator = torch.Generator().manual_seed(0)
    weight = quantize_matrix(torch.randn(40, 96, generator=generator), group_size=32)[0]
    return Int4Linear(weight, torch.randn(40, generator=generator) if bias else None, torch.float32)


def as_float(layer: Int4Linear) -> nn.Linear:
    linear = nn.Linear(96, 40, bias=layer.bias is not None)
    linear.weight.data = decode(layer.int4(), torch.float32)
    if layer.bias is not None:
        linear.bias.data = layer.bias.data.clone()
    return linear


def pair(**changes: Any) -> tuple[Any, Any]:
    """PEFT over our layer, and over a float one with the same weight; in float64, with the same adapters."""
    mebp.register_peft()
    base = frozen()
    ours, theirs = (
        peft.get_peft_model(Net(layer), lora_config(**changes), autocast_adapter_dtype=False).double()
        for layer in (base, as_float(base))
    )
    assert isinstance(ours.base_model.model.net, mebp.PeftInt4Linear)
    assert type(theirs.base_model.model.net) is peft.tuners.lora.Linear
    return ours, theirs


def randomize(ours: Any, theirs: Any) -> None:
    for model in (ours, theirs):
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def same(ours: Any, theirs: Any, seed: int | None = None, **kwargs: Any) -> None:
    """Output and every gradient are equal, in float64."""
    x = torch.randn(3, 5, 96, dtype=torch.float64)
    dy = torch.randn(3, 5, 40, dtype=torch.float64)
    found = []
    for model in (ours, theirs):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        if seed is not None:
            torch.manual_seed(seed)
        y = model(inputs, **kwargs)
        y.backward(dy)
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append({"y": y.detach(), "x": inputs.grad} | grads)
    assert found[0].keys() == found[1].keys()
    for name, truth in found[1].items():
        assert (truth is None) == (found[0][name] is None), name
        if truth is not None:
            assert relative_rms(found[0][name], truth) < 1e-13, name


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of the fused operation."""
    calls: list[Any] = []
    original = peft_layer.int4_lora_linear
    monkeypatch.setattr(peft_layer, "int4_lora_linear", lambda *args: calls.append(args) or original(*args))
    return calls


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"bias": "all"}], ids=str)
def test_one_adapter_is_fused_and_exact(changes: dict[str, Any], fused: list[Any]) -> None:
    ours, theirs = pair(**changes)
    randomize(ours, theirs)
    same(ours, theirs)
    assert len(fused) == 1


def test_dropout_draws_what_pefts_own_layer_draws(fused: list[Any]) -> None:
    ours, theirs = pair(lora_dropout=0.5)
    randomize(ours, theirs)
    same(ours.train(), theirs.train(), seed=3)
    assert not fused
    same(ours.eval(), theirs.eval())
    assert len(fused) == 1


def test_several_adapters(fused: list[Any]) -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        model.add_adapter("second", lora_config(r=2, lora_alpha=9))
    randomize(ours, theirs)
    for active in ("second", "default"):
        for model in (ours, theirs):
            model.set_adapter(active)
        same(ours, theirs)
    assert len(fused) == 2
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
    same(ours, theirs)
    for model in (ours, theirs):
        model.eval()
    same(ours, theirs, adapter_names=["default", "__base__", "second"])
    assert len(fused) == 2


@pytest.mark.parametrize("combination", ["svd", "ties_svd", "linear", "cat"])
def test_combined_adapters(combination: str) -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        model.add_adapter("second", lora_config(lora_alpha=9))
    randomize(ours, theirs)
    for model in (ours, theirs):
        model.add_weighted_adapter(
            ["default", "second"], [0.7, 0.4], "both", combination_type=combination, density=0.5, svd_rank=6
        )
        model.set_adapter("both")
        model.double()
    layer, truth = (model.base_model.model.net for model in (ours, theirs))
    assert relative_rms(layer.get_delta_weight("second"), truth.get_delta_weight("second")) < 1e-14
    assert layer.lora_A["both"].weight.shape == truth.lora_A["both"].weight.shape
    # A singular vector's sign is free, so gradients of A and B are not compared. PEFT makes "both" in float32.
    x = torch.randn(3, 96, dtype=torch.float64)
    assert relative_rms(ours(x), theirs(x)) < 1e-6


def test_disabled_and_lora_bias(fused: list[Any]) -> None:
    ours, theirs = pair(lora_bias=True)
    randomize(ours, theirs)
    same(ours, theirs)
    x = torch.randn(2, 96, dtype=torch.float64)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert relative_rms(ours(x), theirs(x)) < 1e-13
    assert relative_rms(ours(x), theirs(x)) < 1e-13
    assert not fused


def test_hooks_are_called(fused: list[Any]) -> None:
    ours, theirs = pair()
    randomize(ours, theirs)
    seen: list[torch.Tensor] = []
    for module in ("base_layer", "lora_A.default"):
        handle = ours.base_model.model.net.get_submodule(module).register_forward_hook(
            lambda module, args, y: seen.append(y)
        )
        same(ours, theirs)
        handle.remove()
    assert len(seen) == 2 and not fused


def test_autocast_and_bfloat16() -> None:
    """The fused layer rounds where a linear layer would: as near to the truth as PEFT's own, or nearer."""
    ours, theirs = pair()
    randomize(ours, theirs)
    x = torch.randn(6, 96)
    truth = theirs(x.double())
    for model in (ours, theirs):
        model.float()
    with torch.autocast("cpu", torch.bfloat16):
        errors = [relative_rms(model(x), truth) for model in (ours, theirs)]
        assert ours(x).dtype == theirs(x).dtype == torch.bfloat16
    assert errors[0] < 1.2 * errors[1] < 0.02


def test_whatever_the_order_of_registering() -> None:
    config = lora_config()  # made before
    mebp.register_peft()
    mebp.register_peft()
    assert isinstance(peft.get_peft_model(Net(frozen()), config).base_model.model.net, mebp.PeftInt4Linear)
    # PEFT's other layers are as they were, and a mapping of the user's own counts.
    assert type(peft.get_peft_model(Net(nn.Linear(8, 8)), config).base_model.model.net) is peft.tuners.lora.Linear

    class Mine(mebp.PeftInt4Linear):  # type: ignore[name-defined,misc]
        pass

    config = lora_config()
    config._register_custom_module({Int4Linear: Mine})
    assert type(peft.get_peft_model(Net(frozen()), config).base_model.model.net) is Mine


def test_what_our_layer_cannot_do() -> None:
    ours, _ = pair()
    with pytest.raises(NotImplementedError, match="int4 weight cannot take an adapter in.*mebp merge"):
        ours.merge_adapter()
    with pytest.raises(NotImplementedError, match="mebp merge"):
        ours.merge_and_unload()
    for changes, named in (
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
    ):
        with pytest.raises(ValueError, match=f"does not support {named}"):
            peft.get_peft_model(Net(frozen()), lora_config(**changes))
    with pytest.raises(ValueError, match="does not support target_parameters"):
        peft.get_peft_model(Net(frozen()), lora_config(target_modules=[], target_parameters=["net.weight"]))
    ours.add_adapter("fine", lora_config())
    with pytest.raises(ValueError, match="use_dora=True"):
        ours.add_adapter("dora", lora_config(use_dora=True))
    adapted = mebp.replace_linears(Net(nn.Linear(64, 8)), mebp.LoraConfig(r=2))
    with pytest.raises(ValueError, match="has an adapter of mebp_triton already"):
        peft.get_peft_model(adapted, lora_config())


def test_copies() -> None:
    ours, theirs = pair()
    randomize(ours, theirs)
    layer = ours.base_model.model.net
    x = torch.randn(2, 96, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_files_are_pefts(tmp_path: Path) -> None:
    """Saved over int4, loaded over int4, and over the float model with the decoded weights by PEFT alone."""
    source = save_tiny_model("llama", tmp_path / "model")

    def float_model() -> Any:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=batch(2, 12, None)["input_ids"]).logits

    config = lora_config(target_modules="all-linear", task_type="CAUSAL_LM")
    ours = peft.get_peft_model(mebp.replace_linears(float_model(), group_size=32), config)
    randomize_adapter(ours)
    ours.save_pretrained(tmp_path / "ours")
    base = float_model()
    for name, module in base.named_modules():
        if f"base_model.model.{name}" in dict(ours.named_modules()) and type(module) is nn.Linear and name != "lm_head":
            weight = ours.get_submodule(f"base_model.model.{name}").base_layer.int4()
            module.weight.data = decode(weight, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert relative_rms(logits(ours), logits(theirs)) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again = peft.PeftModel.from_pretrained(mebp.replace_linears(float_model(), group_size=32), tmp_path / "theirs")
    layers = [module for module in again.modules() if isinstance(module, mebp.PeftInt4Linear)]
    assert len(layers) == 21 and torch.equal(logits(again), logits(ours))


# --- PEFT's other methods -------------------------------------------------------------------------------------------


OTHER_METHODS: dict[str, dict[str, Any]] = {
    "AdaLora": {"total_step": 10},
    "FourierFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": 0, "oft_block_size": 8},
    "Road": {},
    "Vera": {},
}


@pytest.mark.parametrize("method", [name for name in OTHER_METHODS if hasattr(peft, f"{name}Config")])
@pytest.mark.parametrize("first", ["peft", "int4"])
def test_pefts_other_methods(method: str, first: str) -> None:
    """Output and gradients of the methods beside the weight are those over the decoded weight, in float64.

    A product of an affine weight's code and scale is exact in float32, so that float64 has the same weight.
    """
    torch.manual_seed(0)
    base = nn.ModuleDict({"net": nn.Linear(64, 64)})
    config = getattr(peft, f"{method}Config")(target_modules=["net"], **OTHER_METHODS[method])
    if first == "peft":
        theirs = peft.get_peft_model(base, config)
        ours = mebp.replace_linears(copy.deepcopy(theirs), scheme="affine")
    else:
        ours = peft.get_peft_model(mebp.replace_linears(copy.deepcopy(base), scheme="affine"), config)
        theirs = peft.get_peft_model(base, config)
        theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if ".base_layer." not in k}, strict=False)
    net, truth = (model.base_model.model["net"] for model in (ours, theirs))
    assert type(net.get_base_layer()) is Int4Linear and type(net) is type(truth)
    truth.get_base_layer().weight.data = decode(net.get_base_layer().int4(), torch.float32)
    truth.get_base_layer().bias.data = net.get_base_layer().bias.data
    found = []
    for layer in (net, truth):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        layer.double().eval()
        x = torch.randn(3, 64, generator=generator, dtype=torch.float64).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": x.grad} | gradients)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 2
    for name, value in found[1].items():
        assert relative_rms(found[0][name], value) < 1e-12, name


@pytest.mark.parametrize(
    "config", [peft.LoHaConfig, peft.LoKrConfig, peft.HRAConfig, functools.partial(peft.ShiraConfig, r=2)]
)
def test_methods_that_compute_with_the_weight(config: Any) -> None:
    adapted = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), config(target_modules=["0"]))
    message = r"0: PEFT's \w+ computes with the weight itself.* use LoRA"
    with pytest.raises(ValueError, match=message):
        mebp.replace_linears(adapted)
    int4 = mebp.replace_linears(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), exclude_modules=["2"])
    peft.get_peft_model(copy.deepcopy(int4), config(target_modules=["2"]))
    # PEFT 0.17 itself finds that it cannot have SHiRA here.
    with pytest.raises((ValueError, RuntimeError), match=f"{message}|floating point"):
        peft.get_peft_model(int4, config(target_modules=["0"]))


# --- layers that were PEFT's before ----------------------------------------------------------------------------------


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


def test_merged_adapters_are_refused() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged; call unmerge_adapter"):
        mebp.replace_linears(model)
