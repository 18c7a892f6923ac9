"""A model without weights is built like the real one, and its modules are sorted into int4 and float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, save_tiny_model, tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.pytorch_utils import Conv1D

from mebp_triton.models import skeleton
from mebp_triton.models.skeleton import (
    build_skeleton,
    contains_any,
    float32_tensors,
    float_names,
    int4_sites,
    kept_modules,
    linear_names,
    run_on_meta,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_nowhere_and_buffers_are_real(architecture: str) -> None:
    config = tiny_config(architecture)
    skeleton = build_skeleton(config, torch.bfloat16)
    torch.manual_seed(0)
    full: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert {name: p.shape for name, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in full.named_parameters()
    }
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in skeleton.parameters())
    assert not any(p.requires_grad for p in skeleton.parameters())
    buffers = dict(full.named_buffers())
    assert dict(skeleton.named_buffers()).keys() == buffers.keys()
    for name, buffer in skeleton.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert not any(module.training for module in skeleton.modules())


def test_building_leaves_torch_as_it_was() -> None:
    before, default = nn.Module.register_parameter, torch.get_default_dtype()
    build_skeleton(tiny_config("llama"), torch.float16)
    with pytest.raises(ValueError, match="cannot make a causal language model of this config: Unrecognized") as caught:
        build_skeleton(AutoConfig.for_model("vit"), torch.float16)
    assert "\n" not in str(caught.value)
    assert nn.Module.register_parameter is before and torch.get_default_dtype() == default
    assert nn.Linear(2, 2).weight.device.type == "cpu"


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_parameters_are_not_filled_with_random_numbers() -> None:
    with Watch() as watch:
        build_skeleton(tiny_config("llama"), torch.float16)
    assert "empty" in watch.seen and not watch.seen & {"normal_", "uniform_"}


def test_attention_implementation() -> None:
    assert build_skeleton(tiny_config("llama"), torch.float32, "eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_int4_or_float_and_never_both(architecture: str) -> None:
    skeleton = build_skeleton(tiny_config(architecture), torch.float32)
    sites, tied = int4_sites(skeleton)
    int4 = [f"{site.name}.weight" for site in sites]
    floats = float_names(skeleton, sites)
    assert len(set(int4)) == len(int4) and not set(int4) & set(floats)
    assert set(int4) | set(floats) == {name for name, _ in skeleton.named_parameters()}
    assert all(".weight" not in name or "norm" in name or "ln_" in name or "position" in name or "wpe" in name
               for name in floats), floats  # fmt: skip
    roles = [site.role for site in sites]
    assert roles.count("embedding") == 1 and roles.count("head") == (0 if tied else 1)
    for site in sites:
        shape = tuple(skeleton.get_submodule(site.name).weight.shape)
        wanted = (site.out_features, site.in_features)
        assert shape == (wanted[::-1] if site.transposed else wanted), site
        assert site.transposed == isinstance(skeleton.get_submodule(site.name), Conv1D)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3_text"])
def test_a_tied_head_is_told_from_one_of_its_own(architecture: str, tied: bool) -> None:
    skeleton = build_skeleton(tiny_config(architecture, tie_word_embeddings=tied), torch.float32)
    assert (skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight) == tied
    sites, found = int4_sites(skeleton)
    assert found == tied and any(site.role == "head" for site in sites) != tied


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    skeleton = build_skeleton(tiny_config("llama"), torch.float32)
    skeleton.lm_head = nn.Sequential(nn.Linear(48, 97))
    with pytest.raises(ValueError, match="no plain embedding and linear head .*Sequential"):
        int4_sites(skeleton)


def test_subclasses_of_linear_stay_as_they_are_unless_they_compute_the_same() -> None:
    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Same(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    skeleton = build_skeleton(tiny_config("llama"), torch.float32)
    skeleton.model.layers[0].mlp.up_proj = Other(48, 80)
    skeleton.model.layers[1].mlp.up_proj = Same(48, 80, bias=False)
    sites, _ = int4_sites(skeleton)
    name = "model.layers.0.mlp.up_proj"
    assert name not in {site.name for site in sites} and f"{name}.weight" in float_names(skeleton, sites)
    assert name.replace("0", "1") in {site.name for site in sites}


LISTED = ["mlp.gate_proj", "o_proj", "layers.1.self_attn.q_proj.weight", "k_pro"]
KEPT = ["mlp.gate_proj", "self_attn.o_proj"]


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_what_transformers_keeps_in_float32_stays_float(attribute: str) -> None:
    """DeepSeek's indexers and LongCat's routers are listed so. An entry is some whole parts of a path."""
    skeleton = build_skeleton(tiny_config("llama"), torch.float32)
    setattr(skeleton, attribute, LISTED)
    wanted = {f"model.layers.{index}.{name}" for index in range(3) for name in KEPT} | {
        "model.layers.1.self_attn.q_proj"
    }
    kept = kept_modules(skeleton)
    linear = [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)]
    assert {f"model.{name}" for name in linear if kept(f"model.{name}")} == wanted
    sites, _ = int4_sites(skeleton)
    assert wanted.isdisjoint(site.name for site in sites) and len(sites) == 1 + len(linear) - len(wanted)
    assert {f"{name}.weight" for name in wanted} <= set(float_names(skeleton, sites))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtypes_of_float_tensors_are_those_of_from_pretrained(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", ["o_proj"])
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["gate_proj"])
    theirs = AutoModelForCausalLM.from_pretrained(save_tiny_model("llama", tmp_path), dtype=dtype)
    in_float32 = float32_tensors(theirs, dtype)
    for name, parameter in theirs.named_parameters():
        assert parameter.dtype == (torch.float32 if in_float32(name) else dtype), name


def test_autocast_is_accepted_on_the_meta_device() -> None:
    """transformers 4 computes its rotary embedding inside one, for which torch has no dtype."""
    seen = []

    def model(**inputs: Any) -> None:
        with torch.autocast(device_type="meta", enabled=False):
            seen.append(inputs["input_ids"].device.type)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append(torch.is_autocast_enabled("cpu"))

    run_on_meta(model)
    assert seen == ["meta", True] and torch.autocast is not skeleton._Autocast


def test_names_are_whole_parts_of_a_path() -> None:
    path = "model.layers.1.self_attn.q_proj"
    for name in ("q_proj", "model", "self_attn.q_proj", "layers.1", path):
        assert contains_any(path, ["nothing", name])
    for name in ("q_pro", "_proj", "layers.1.q_proj", "ayers.1", ""):
        assert not contains_any(path, [name])
    assert not contains_any(path, [])


def test_linear_layers_are_named_without_embedding_and_head() -> None:
    sites, _ = int4_sites(build_skeleton(tiny_config("gpt2", tie_word_embeddings=False), torch.float32))
    names = linear_names(sites)
    assert len(names) == 12 and {name.split(".")[-1] for name in names} == {"c_attn", "c_proj", "c_fc"}
    assert len(sites) == 14
