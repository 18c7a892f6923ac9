"""Directories saved with int4 layers, as a source: the codes that were saved, or an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from int4_models import int4_layers, quantized
from safetensors.torch import load_file, save_file

from mebp_triton import Int4Linear, Int4Weight, quantize
from mebp_triton.convert.readers import open_source
from mebp_triton.convert.readers.int4_dir import Int4Directory
from mebp_triton.convert.recipe import TABLE_FORM
from mebp_triton.models.skeleton import build_skeleton, int4_sites
from mebp_triton.store.reader import Store

UP = "model.layers.1.mlp.up_proj"


def saved(source: Path, directory: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The int4 model of the float model ``source``, which is saved in ``directory``."""
    model = quantized(source, dtype, **settings)
    model.save_pretrained(directory, max_shard_size="30KB")
    return model


@pytest.fixture(scope="module")
def llama(shared_store: Any) -> Path:
    return shared_store("llama").parent / "model"


def edited(directory: Path, target: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """A copy in one file, with some tensors changed (None: left out), and some settings."""
    target.mkdir()
    held = {name: tensor for shard in directory.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    held = {name: value for name, value in (held | tensors).items() if value is not None}
    save_file(held, target / "model.safetensors", {"format": "pt"})
    content = json.loads((directory / "config.json").read_text())
    content["quantization_config"].update(config)
    (target / "config.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize(
    ("architecture", "scheme", "bits", "dtype"),
    [
        ("llama", "symmetric", 4, torch.bfloat16),
        ("gpt2", "affine", 4, torch.float32),
        ("opt", "codebook", 4, torch.bfloat16),
        ("llama", "affine", 8, torch.bfloat16),
    ],
)
def test_a_store_has_the_codes_that_were_saved(
    architecture: str, scheme: Any, bits: int, dtype: torch.dtype, shared_store: Any, tmp_path: Path
) -> None:
    model = saved(shared_store(architecture).parent / "model", tmp_path / "int4", dtype, scheme=scheme, bits=bits)
    report = quantize(tmp_path / "int4", tmp_path / "store")
    store, layers = Store(tmp_path / "store"), int4_layers(model)
    assert set(report.taken_over) == layers.keys() and store.source == "int4 directory int4"
    for name, layer in layers.items():
        tensors, expected = store.weight(name).tensors(), layer.int4().tensors()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[kind]) for kind, tensor in tensors.items()), name
    forms = {name: report.forms[name] for name in report.forms if name in layers}
    assert {(form.scheme, form.bits) for form in forms.values()} == {(scheme, bits)}
    assert {report.forms[name] for name in report.forms.keys() - layers.keys()} == {TABLE_FORM}, "which were float"
    assert "quantization_config" not in json.loads((tmp_path / "store" / "config.json").read_text())


def test_float32_scales_and_float_layers(llama: Path, tmp_path: Path) -> None:
    wide = Path(shutil.copytree(llama, tmp_path / "wide"))
    weights = load_file(llama / "model.safetensors")
    save_file(weights | {f"{UP}.weight": weights[f"{UP}.weight"] * 1e6}, wide / "model.safetensors", {"format": "pt"})
    model = saved(wide, tmp_path / "int4", modules_to_not_convert=["k_proj"])
    source = open_source(tmp_path / "int4")
    assert isinstance(source, Int4Directory)
    skeleton = build_skeleton(source.config, torch.float32)
    source.bind(skeleton)
    for site in int4_sites(skeleton)[0]:
        value, module = source.read(f"{site.name}.weight"), model.get_submodule(site.name)
        if isinstance(module, Int4Linear):
            assert isinstance(value, Int4Weight)
            assert torch.equal(value.scales, module.int4().scales) and torch.equal(value.packed, module.int4().packed)
        else:
            assert isinstance(value, torch.Tensor) and torch.equal(value, module.weight)
    wide_scales = source.read(f"{UP}.weight")
    assert isinstance(wide_scales, Int4Weight) and wide_scales.scales.dtype == torch.float32


def test_what_was_tampered_with(llama: Path, tmp_path: Path) -> None:
    saved(llama, tmp_path / "int4", scheme="symmetric")
    held = load_file(next(f for f in tmp_path.glob("int4/*.safetensors") if f"{UP}.scales" in load_file(f)))
    scales, packed = held[f"{UP}.scales"], held[f"{UP}.weight"]
    for number, (tensors, config, message) in enumerate(
        [
            ({f"{UP}.scales": None}, {}, f"lacks {UP}.scales"),
            ({}, {"scheme": "affine"}, "lacks model.layers.0"),
            ({f"{UP}.scales": scales[:, :-2].contiguous()}, {}, "wanted the scales of 80 rows"),
            ({f"{UP}.scales": scales.view(torch.float16)}, {}, f"{UP}.scales is F16"),
            ({f"{UP}.scales": scales[0].contiguous()}, {}, "wanted the scales of 80 rows"),
            ({f"{UP}.scales": scales[:1].contiguous()}, {}, f"{UP}.weight: scales must have shape"),
            ({f"{UP}.scales": torch.full_like(scales, 255)}, {}, f"{UP}.weight of the source is damaged: scales must"),
            ({f"{UP}.weight": packed[:-1].contiguous()}, {}, f"{UP}.weight: scales must have shape"),
            ({f"{UP}.weight": packed[:, :-1].contiguous()}, {}, r"\(80, 31\) is no shape of 48 codes of 4 bits"),
            ({}, {"bits": 8}, "is no shape of .* codes of 8 bits"),
            ({f"{UP}.weight": packed.to(torch.int32)}, {}, "is I32"),
            ({}, {"layout": "other"}, "layout 'other' cannot be read"),
            ({}, {"group_size": 31}, "group_size must be one of"),
            ({}, {"modules_to_not_convert": 3}, r"config\.json: quantization_config: "),
            ({}, {"quant_method": "torchao"}, "torchao"),
        ]
    ):
        broken = edited(tmp_path / "int4", tmp_path / str(number), tensors, **config)
        with pytest.raises(ValueError, match=message):
            quantize(broken, tmp_path / "store")
        assert not (tmp_path / "store").exists()
