"""Directories saved with int4 layers, as a source: the codes that were saved, or an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mebp_triton import Int4Config, Int4Linear, quantize
from mebp_triton.convert.readers import open_source
from mebp_triton.models.skeleton import build_skeleton, int4_sites
from mebp_triton.store.reader import Store

UP = "model.layers.1.mlp.up_proj"


def saved(directory: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The int4 model that was saved as ``directory / "int4"``."""
    source = save_tiny_model(architecture, directory / "model")
    settings = Int4Config(**({"group_size": 32} | config))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=settings)
    model.save_pretrained(directory / "int4", max_shard_size="30KB")
    return model


def edited(directory: Path, target: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """In one file, with some tensors changed (None: left out), and some settings."""
    target.mkdir()
    held = {name: tensor for shard in directory.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    held = {name: value for name, value in (held | tensors).items() if value is not None}
    save_file(held, target / "model.safetensors", {"format": "pt"})
    content = json.loads((directory / "config.json").read_text())
    content["quantization_config"].update(config)
    (target / "config.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "scheme"), [("llama", "symmetric"), ("gpt2", "affine"), ("opt", "codebook")])
def test_a_store_has_the_codes_that_were_saved(
    architecture: str, scheme: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = saved(tmp_path, architecture, dtype, scheme=scheme)
    report = quantize(tmp_path / "int4", tmp_path / "store")
    store = Store(tmp_path / "store")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}
    assert set(report.taken_over) == layers.keys()
    for name, layer in layers.items():
        tensors, expected = store.weight(name).tensors(), layer.int4().tensors()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[kind]) for kind, tensor in tensors.items()), name
    # The embedding was float, and follows the scheme of the others.
    assert set(report.schemes.values()) == {scheme}
    assert "quantization_config" not in json.loads((tmp_path / "store" / "config.json").read_text())


def test_float32_scales_and_float_layers(tmp_path: Path) -> None:
    saved(tmp_path, modules_to_not_convert=["k_proj"])
    weight = load_file(tmp_path / "model" / "model.safetensors")[f"{UP}.weight"] * 1e6
    shutil.rmtree(tmp_path / "int4")
    source = tmp_path / "big"
    shutil.copytree(tmp_path / "model", source)
    save_file(load_file(source / "model.safetensors") | {f"{UP}.weight": weight}, source / "model.safetensors")
    settings = Int4Config(group_size=32, modules_to_not_convert=["k_proj"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "int4")
    opened = open_source(tmp_path / "int4")
    skeleton = build_skeleton(opened.config, torch.float32)
    opened.bind(skeleton)
    for site in int4_sites(skeleton)[0]:
        value, module = opened.read(f"{site.name}.weight"), model.get_submodule(site.name)
        if isinstance(module, Int4Linear):
            assert torch.equal(value.scales, module.int4().scales) and torch.equal(value.packed, module.int4().packed)
        else:
            assert torch.equal(value, module.weight)
    assert opened.read(f"{UP}.weight").scales.dtype == torch.float32


def test_what_was_tampered_with(tmp_path: Path) -> None:
    saved(tmp_path)
    held = load_file(next(f for f in tmp_path.glob("int4/*.safetensors") if f"{UP}.scales" in load_file(f)))
    scales, packed = held[f"{UP}.scales"], held[f"{UP}.weight"]
    for number, (tensors, config, message) in enumerate(
        [
            ({f"{UP}.scales": None}, {}, f"lacks {UP}.scales"),
            ({}, {"scheme": "affine"}, "lacks model.layers.0"),
            ({f"{UP}.scales": scales[:, :-2].contiguous()}, {}, "wanted the scales of 80 rows"),
            ({f"{UP}.scales": scales[:1].contiguous()}, {}, "scales must have shape"),
            ({f"{UP}.scales": torch.full_like(scales, 255)}, {}, "is not finite"),
            ({f"{UP}.weight": packed[:-1].contiguous()}, {}, "has shape"),
            ({f"{UP}.weight": packed[:, :-1].contiguous()}, {}, "packed must have 32 columns"),
            ({f"{UP}.weight": packed.to(torch.int32)}, {}, "is I32"),
            ({}, {"layout": "other"}, "layout 'other' cannot be read"),
            ({}, {"group_size": 31}, "group_size must be one of"),
            ({}, {"quant_method": "gptq"}, "gptq"),
        ]
    ):
        broken = edited(tmp_path / "int4", tmp_path / str(number), tensors, **config)
        with pytest.raises(ValueError, match=message):
            quantize(broken, tmp_path / "store")
        assert not (tmp_path / "store").exists()
