"""compressed-tensors directories laid out by hand: every weight is what the format's formula makes of it."""

import re

import pytest
import torch
from packed_layouts import compressed, compressed_mxfp4
from packed_models import assert_exact, edited, opened, packed_directory

from mebp_triton.convert.quantize import quantize
from mebp_triton.kernels.reference import decode
from mebp_triton.store.reader import Store


def settings(group_size=32, symmetric=True, group=None, bits=4, **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    only = {"targets": ["Linear"], "weights": weights, "input_activations": None} | (group or {})
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": only}}
    more = {"ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}} | more
    return {"quantization_config": stated | more}


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_taken_over_to_the_bit(tmp_path, group_size, symmetric, dtype):
    layout = compressed(group_size, symmetric, dtype=dtype)
    truth = packed_directory(tmp_path / "model", layout, settings(group_size, symmetric), dtype=dtype)
    report = quantize(tmp_path / "model", tmp_path / "store")
    assert set(report.taken_over) == truth.keys()
    form = ("symmetric", "F16") if symmetric else ("affine", "F32" if dtype == torch.float16 else None)
    assert_exact(tmp_path / "store", truth, *form, {group_size if group_size > 0 else 128})


@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_biases_and_fused_projections(tmp_path, architecture):
    truth = packed_directory(tmp_path / "model", compressed(64), settings(64), architecture)
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "symmetric", "F16", {64})


@pytest.mark.parametrize("rows", [80, 100])
def test_rows_and_columns_that_fill_no_word(tmp_path, rows):
    size = {"hidden_size": 60, "intermediate_size": rows, "num_attention_heads": 3, "num_key_value_heads": 1}
    truth = packed_directory(tmp_path / "model", compressed(32, False), settings(32, False), **size)
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "affine", None, {32})


def test_zeros_as_older_versions_stored_them(tmp_path):
    truth = packed_directory(tmp_path / "model", compressed(symmetric=False, old_zeros=True), settings(symmetric=False))
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "affine", "F32", {32})


def test_an_order_of_columns(tmp_path):
    truth = packed_directory(tmp_path / "absent", compressed(g_idx="absent"), settings())
    quantize(tmp_path / "absent", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "symmetric", "F16", {32})
    truth = packed_directory(tmp_path / "ordered", compressed(g_idx="act-order"), settings())
    source = opened(tmp_path / "ordered")
    assert all(torch.equal(source.read(f"{name}.weight"), weight.float()) for name, weight in truth.items())


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
def test_other_widths(tmp_path, bits):
    stated = settings(symmetric=False, bits=bits)
    truth = packed_directory(tmp_path / "model", compressed(bits=bits, symmetric=False), stated)
    source = opened(tmp_path / "model")
    for name, weight in truth.items():
        read = source.read(f"{name}.weight")
        assert read.bits == (8 if bits > 4 else 4)
        assert torch.equal(decode(read, torch.float32), weight.float())


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_with_unused_bits_as_older_versions_packed_them(whole, tmp_path, bits):
    """7 bits take the words that 8 bits do, and must not be read as these."""
    words = torch.zeros(96, -(-96 // (32 // bits)), dtype=torch.int32)
    directory = edited(whole, tmp_path / "model", {f"{Q}.weight_packed": words}, **settings(bits=bits))
    message = f"num_bits {bits}, and {Q}.weight_packed has unused bits in each word, which is not supported"
    with pytest.raises(ValueError, match=message):
        opened(directory).read(f"{Q}.weight")


def test_the_width_must_be_one_that_is_stated(whole, tmp_path):
    words = torch.zeros(96, 24, dtype=torch.int32)
    directory = edited(whole, tmp_path / "model", {f"{Q}.weight_packed": words})
    with pytest.raises(ValueError, match="has 24 words along dimension 1, which hold 96 codes of no width"):
        opened(directory).read(f"{Q}.weight")


def test_mxfp4(tmp_path):
    size = {"hidden_size": 64, "intermediate_size": 192}
    truth = packed_directory(tmp_path / "model", compressed_mxfp4, settings(format="mxfp4-pack-quantized"), **size)
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "codebook", "F16", {32})


def test_the_older_key_of_the_config(tmp_path):
    config = {"compression_config": settings()["quantization_config"]}
    truth = packed_directory(tmp_path / "model", compressed(), config)
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "symmetric", "F16", {32})
    assert "compression_config" not in (tmp_path / "store" / "config.json").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory that tests copy."""
    directory = tmp_path_factory.mktemp("compressed") / "model"
    packed_directory(directory, compressed(symmetric=False), settings(symmetric=False))
    return directory


Q = "model.layers.1.self_attn.q_proj"


def test_a_quantised_cache_is_said_to_be_left_out(whole, tmp_path, recwarn):
    scale = {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    directory = edited(whole, tmp_path / "model", scale, **settings(kv_cache_scheme={"num_bits": 8}))
    opened(directory)
    (said,) = [str(warning.message) for warning in recwarn]
    assert "kv_cache_scheme, the rounding of cached keys and values, has no effect on a store" in said
    directory = edited(whole, tmp_path / "other", scale)
    with pytest.warns(UserWarning, match="k_scale: left out"):
        opened(directory)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.weight_scale": None}, f"lacks {Q}.weight_scale"),
        ({f"{Q}.weight_packed": None}, f"lacks {Q}.weight"),
        ({f"{Q}.weight_zero_point": None}, "has no weight_zero_point, and config.json says that it is not symmetric"),
        ({f"{Q}.weight_shape": torch.tensor([96, 95])}, r"has shape \(96, 95\), the model wants \(96, 96\)"),
        ({f"{Q}.weight_shape": torch.tensor([96])}, r"weight_shape is I64 \(1,\)"),
        ({f"{Q}.weight_packed": torch.zeros(96, 13, dtype=torch.int32)}, "weight_packed has 13 words"),
        ({f"{Q}.weight_packed": torch.zeros(95, 12, dtype=torch.int32)}, r"weight_packed is I32 \(95, 12\)"),
        ({f"{Q}.weight_packed": torch.zeros(96, 12)}, "weight_packed is F32"),
        ({f"{Q}.weight_zero_point": torch.zeros(11, 3, dtype=torch.int32)}, r"zero_point is I32 \(11, 3\)"),
        ({f"{Q}.weight_scale": torch.ones(96, 2)}, r"zero_point is I32 \(12, 3\), wanted I32 \(12, 2\)"),
        ({f"{Q}.weight_scale": torch.ones(96)}, "wanted 2 dimensions"),
        ({f"{Q}.weight_scale": torch.full((96, 3), float("nan"))}, "damaged: scales must be finite"),
    ],
    ids=str,
)
def test_damage_is_one_line(whole, tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message) as caught:
        quantize(edited(whole, tmp_path / "model", tensors), tmp_path / "store")
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24', which is not supported: give the unquantised model"),
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({"group": {"format": "nvfp4-pack-quantized"}}, "format 'nvfp4-pack-quantized'"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config, which rotates weights and activations"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config {'format': 'sparse-24-bitmask'}"),
        ({"group": {"input_activations": {"num_bits": 8}}}, "input_activations that are quantised"),
        ({"group": {"weights": {"strategy": "block"}}}, "strategy 'block'"),
    ],
    ids=str,
)
def test_variants_that_are_refused(whole, tmp_path, stated, message):
    directory = edited(whole, tmp_path / "model", {}, **settings(**stated))
    with pytest.raises(ValueError, match="quantization_config has " + re.escape(message)):
        opened(directory)


@pytest.mark.parametrize(
    "groups",
    [[1], {"group_0": 3}, {"group_0": {"weights": 3}}, {"group_0": {"weights": {"group_size": "32"}}}],
    ids=str,
)
def test_settings_of_wrong_types_are_no_reason_to_fail(whole, tmp_path, groups):
    stated = settings()["quantization_config"] | {"config_groups": groups}
    source = opened(edited(whole, tmp_path / "model", {}, quantization_config=stated))
    assert source.read(f"{Q}.weight").group_size == 32


def test_scales_have_one_dtype_with_minima(whole, tmp_path):
    quantize(whole, tmp_path / "store")
    assert {Store(tmp_path / "store").weight(Q).minimum.dtype} == {torch.float32}
