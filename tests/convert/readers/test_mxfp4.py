"""Experts in MXFP4 are taken over bit for bit, and are what the format says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import save_tiny_model
from safetensors.torch import load_file, save_file

from mebp_triton.convert.quantize import quantize
from mebp_triton.convert.readers import open_source
from mebp_triton.kernels.names import Form
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.reader import Store

needs_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has no interface of experts")

EXPERTS, HIDDEN = 4, 64
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def mxfp4_directory(path: Path) -> dict[str, torch.Tensor]:
    """A tiny gpt-oss with experts in MXFP4. Returns them as floats ``[experts, out, in]``, by the parameter's name."""
    save_tiny_model("gpt_oss", path)
    tensors = load_file(path / "model.safetensors")
    truth = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(118, 126, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, exponents
        nibbles = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
        values = torch.tensor([*VALUES, *(-value for value in VALUES)])[nibbles]
        truth[name] = (values * torch.exp2(exponents.float() - 127)[..., None]).flatten(-2)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (path / "config.json").write_text(json.dumps(config))
    return truth


def bound(path: Path) -> Any:
    source = open_source(path)
    source.bind(build_skeleton(source.config, torch.float32))
    return source


@needs_5
def test_a_store_has_the_codes_of_every_expert(tmp_path: Path) -> None:
    truth = mxfp4_directory(tmp_path / "model")
    report = quantize(tmp_path / "model", tmp_path / "store")
    store = Store(tmp_path / "store")
    for name, values in truth.items():
        path, _, parameter = name.rpartition(".")
        for expert in range(EXPERTS):
            matrix = f"{path}.{expert}.{parameter}"
            assert torch.equal(decode(store.weight(matrix), torch.float32), values[expert]), matrix
            assert report.forms[matrix] == Form("codebook", 32, 4) and matrix in report.taken_over
    assert not report.decoded and report.forms["model.layers.0.self_attn.q_proj"] == Form("codebook", 32, 4)
    assert "quantization_config" not in json.loads((tmp_path / "store" / "config.json").read_text())


@needs_5
def test_all_experts_at_once_are_floats_of_the_parameters_shape(tmp_path: Path) -> None:
    truth = mxfp4_directory(tmp_path)
    source = bound(tmp_path)
    for name, values in truth.items():
        assert torch.equal(source.read(name), values.transpose(1, 2))


@needs_5
def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    mxfp4_directory(tmp_path)
    file = tmp_path / "model.safetensors"
    whole, name = load_file(file), "model.layers.1.mlp.experts.down_proj"
    save_file({key: tensor for key, tensor in whole.items() if key != f"{name}_scales"}, file)
    with pytest.raises(ValueError, match=f"lacks {name}_scales"):
        open_source(tmp_path)
    save_file(whole | {f"{name}_scales": whole[f"{name}_scales"].float()}, file)
    with pytest.raises(ValueError, match="in place of bytes"):
        bound(tmp_path).read(f"{name.replace('.down_proj', '.2.down_proj')}.weight")
    save_file(whole | {f"{name}_blocks": whole[f"{name}_blocks"][:, :, :, :8].contiguous()}, file)
    with pytest.raises(ValueError, match="blocks has shape"):
        bound(tmp_path).read(f"{name.replace('.down_proj', '.2.down_proj')}.weight")


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 has an interface of experts")
def test_older_versions_of_transformers_are_refused(tmp_path: Path) -> None:
    mxfp4_directory(tmp_path / "model")
    with pytest.raises(ValueError, match="need transformers 5 or later"):
        quantize(tmp_path / "model", tmp_path / "store")
