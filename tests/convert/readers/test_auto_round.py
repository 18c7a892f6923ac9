"""AutoRound directories: the packings of GPTQ and AWQ, told apart by the settings."""

import re

import pytest
from packed_layouts import awq, gptq
from packed_models import assert_exact, opened, packed_directory

from mebp_triton.convert.quantize import quantize


def settings(packing="auto_round:auto_gptq", **more):
    stated = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
    return {"quantization_config": stated | {"packing_format": packing, "act_bits": 16} | more}


def without_g_idx(version):
    return gptq(version=version, g_idx=False)


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("auto_round:auto_gptq", without_g_idx(1)),
        ("auto_round:auto_gptq", gptq(version=1)),
        ("auto_round:gptqmodel", without_g_idx(2)),
        ("auto_round", without_g_idx(2)),
        ("auto_round:auto_awq", awq()),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_weights_are_taken_over_to_the_bit(tmp_path, packing, layout, architecture):
    truth = packed_directory(tmp_path / "model", layout, settings(packing), architecture)
    report = quantize(tmp_path / "model", tmp_path / "store")
    assert set(report.taken_over) == truth.keys()
    assert_exact(tmp_path / "store", truth, "affine", "F32", {32})


def test_single_layers_may_have_other_groups_and_widths(tmp_path):
    """As ``extra_config`` states them; the tensors tell it."""
    more = {"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 32}}}

    def layout(module, rows, columns):
        if module == "model.layers.0.mlp.up_proj":
            return gptq(bits=8, g_idx=False)(module, rows, columns)
        return gptq(128 if "down" in module else 32, g_idx=False)(module, rows, columns)

    truth = packed_directory(tmp_path / "model", layout, settings(**more), intermediate_size=256)
    report = quantize(tmp_path / "model", tmp_path / "store")
    assert report.forms["model.layers.0.mlp.up_proj"] == ("affine", 32, 8) and not report.decoded
    down = {name: truth.pop(name) for name in list(truth) if "down" in name}
    assert_exact(tmp_path / "store", truth, "affine", "F32", {32})
    assert_exact(tmp_path / "store", down, "affine", "F32", {128})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"packing": "auto_round:llm_compressor"},
            "packing_format 'auto_round:llm_compressor', which is not supported",
        ),
        ({"packing": ["auto_round"]}, "packing_format ['auto_round']"),
        ({"act_bits": 8}, "activations of 8 bits"),
    ],
    ids=str,
)
def test_variants_that_are_refused(tmp_path, more, message):
    packed_directory(tmp_path, gptq(), settings(**more), num_hidden_layers=1)
    with pytest.raises(ValueError, match="quantization_config has .*" + re.escape(message)):
        opened(tmp_path)


def test_the_other_packing_is_damage(tmp_path):
    packed_directory(tmp_path / "model", gptq(), settings("auto_round:auto_awq"), num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"qweight is I32 .*, wanted I32"):
        quantize(tmp_path / "model", tmp_path / "store")
