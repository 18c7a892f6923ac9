"""What a directory says of its quantisation is found in every place where tools write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mebp_triton.convert.readers import NativeForm, native_form
from mebp_triton.convert.readers.quantization import find_quantization, quantization_in, quantization_of


@pytest.mark.parametrize(
    ("config", "method", "where"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq", "quantization_config"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", "compression_config"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "mlx", "quantization"),
        ({"quantization_config": {"bits": 4, "group_size": 64, "mode": "affine"}}, "mlx", "quantization_config"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, None, "quantization_config"),
        ({"quantization_config": {"bits": 4}}, None, "quantization_config"),
        ({"quantization_config": "gptq"}, None, "quantization_config"),
    ],
    ids=str,
)
def test_what_config_json_states(tmp_path: Path, config: dict[str, Any], method: str | None, where: str) -> None:
    found = quantization_in(config)
    assert found is not None and (found.method, found.where) == (method, where)
    assert found == find_quantization(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantization_of(tmp_path) == found


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization": {"scheme": "of its own"}}])
def test_float_weights(tmp_path: Path, config: dict[str, Any]) -> None:
    assert quantization_in(config) is None and find_quantization(tmp_path, config) is None


@pytest.mark.parametrize(("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_older_files_beside_the_config(tmp_path: Path, file: str, method: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text('{"bits": 4}')
    assert find_quantization(tmp_path, {}) == (method, {"bits": 4}, file)
    assert quantization_of(tmp_path) == find_quantization(tmp_path, {})
    stated = {"quantization_config": {"quant_method": "other"}}
    assert find_quantization(tmp_path, stated) == ("other", {"quant_method": "other"}, "quantization_config")
    (tmp_path / file).write_text("{")
    with pytest.raises(ValueError, match=file):
        find_quantization(tmp_path, {})
    assert quantization_of(tmp_path) is None


class Config:
    """Stands for transformers' config, which keeps unknown settings as attributes."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)


HALF, SINGLE = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, ("symmetric", 128, HALF, 4)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, ("affine", 32, SINGLE, 4)),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True}, ("symmetric", 128, HALF, 4)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 1024, "sym": True}, ("symmetric", 128, HALF, 4)),
        ({"quant_method": "gptq", "bits": 8, "group_size": 16, "sym": True}, ("symmetric", 16, HALF, 8)),
        ({"quant_method": "gptq", "bits": 3, "group_size": 96, "sym": True}, ("symmetric", 32, HALF, 4)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True}, ("symmetric", 16, HALF, 8)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 24, "sym": True}, None),
        ({"quant_method": "gptq", "bits": 1, "group_size": 32}, None),
        ({"quant_method": "gptq", "bits": "4", "group_size": 32}, None),
        ({"quant_method": "gptq"}, None),
        ({"quant_method": "unknown"}, None),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, ("affine", 64, SINGLE, 4)),
        ({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}, ("codebook", 32, HALF, 4)),
        ({"quant_method": "compressed-tensors", "config_groups": 3}, None),
        ({"bits": 4, "group_size": 64}, ("affine", 64, HALF, 4, True)),
        ({"bits": 6, "group_size": 64, "mode": "affine"}, ("affine", 64, HALF, 8, True)),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, ("codebook", 32, HALF, 4, True)),
    ],
    ids=str,
)
def test_the_form_that_quantize_will_take_over(settings: dict[str, Any], form: tuple[Any, ...] | None) -> None:
    assert native_form(Config(quantization_config=settings)) == (None if form is None else NativeForm(*form))
    assert native_form(Config()) is None
