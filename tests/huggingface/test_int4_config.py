"""The settings of int4 models: checked when they are made, and the same after a config.json."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.quantizers.auto import AutoQuantizationConfig

from mebp_triton import Int4Config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int3"}, "scheme must be one of symmetric, affine, codebook, got 'int3'"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128, got 48"),
        ({"group_size": True}, "group_size must be one of 32, 64, 128, got True"),
        ({"group_size": 64.0}, r"group_size must be one of 32, 64, 128, got 64\.0"),
        ({"bits": 5}, "bits must be one of 4, 8, got 5"),
        ({"bits": 8, "scheme": "codebook"}, "the codebook scheme has 4 bits"),
        ({"bits": 4, "group_size": 16}, "group_size must be one of 32, 64, 128, got 16"),
        ({"modules_to_not_convert": [3]}, r"modules_to_not_convert must be a list of module names, got \[3\]"),
        ({"float32_scales": [""]}, r"float32_scales must be a list of module names, got \[''\]"),
        ({"layout": "planar64-v9"}, "layout 'planar64-v9' cannot be read"),
        ({"groupsize": 32}, "'groupsize' is not a setting of Int4Config"),
        ({"quant_method": "gptq"}, "quant_method must be 'mebp_int4', got 'gptq'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int4Config(**settings)


def test_one_name_is_a_list_of_one() -> None:
    assert Int4Config(modules_to_not_convert="mlp").modules_to_not_convert == ["mlp"]
    assert Int4Config().modules_to_not_convert == Int4Config().float32_scales == []


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_makes_it_from_a_config_json(bits: int) -> None:
    settings = Int4Config("affine", 32, False, ("mlp", "k_proj"), float32_scales=["layers.1.mlp.up_proj"], bits=bits)
    again: Any = AutoQuantizationConfig.from_dict(settings.to_dict())
    assert type(again) is Int4Config and vars(again) == vars(settings)
    assert ("bits" in settings.to_dict()) == (bits == 8), "older versions read what has 4 bits"
