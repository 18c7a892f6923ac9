"""AWQ directories laid out by hand: every weight is what the format's formula makes of it."""

import re

import pytest
import torch
from packed_layouts import awq
from packed_models import assert_exact, edited, opened, packed_directory

from mebp_triton.convert.quantize import quantize


def settings(group_size=32, **more):
    stated = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return {"quantization_config": stated | more}


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_taken_over_to_the_bit(tmp_path, group_size, dtype):
    truth = packed_directory(tmp_path / "model", awq(group_size, dtype=dtype), settings(group_size), dtype=dtype)
    report = quantize(tmp_path / "model", tmp_path / "store")
    assert set(report.taken_over) == truth.keys() and not report.decoded
    dtype = "F32" if dtype == torch.float16 else None
    assert_exact(tmp_path / "store", truth, "affine", dtype, {group_size if group_size > 0 else 128})


@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_biases_and_fused_projections(tmp_path, architecture):
    truth = packed_directory(tmp_path / "model", awq(64), settings(64), architecture)
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "affine", "F32", {64})


def test_zeros_in_the_middle_are_symmetric(tmp_path):
    truth = packed_directory(tmp_path / "model", awq(symmetric=True), settings())
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "symmetric", "F16", {32})


@pytest.mark.parametrize("method", ["awq", None])
def test_older_files_state_it_beside_the_config(tmp_path, method):
    truth = packed_directory(tmp_path / "model", awq(64), {})
    (tmp_path / "model" / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 64, "version": "GEMM"}')
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "affine", "F32", {64})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory that tests copy."""
    directory = tmp_path_factory.mktemp("awq") / "model"
    packed_directory(directory, awq(), settings())
    return directory


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.qzeros": None}, f"lacks {Q}.qzeros"),
        ({f"{Q}.scales": None}, f"lacks {Q}.scales"),
        ({f"{Q}.qweight": None}, f"lacks {Q}.weight"),
        ({f"{Q}.qweight": torch.zeros(12, 96, dtype=torch.int32)}, r"qweight is I32 \(12, 96\), wanted I32 \(96, 12\)"),
        ({f"{Q}.qweight": torch.zeros(96, 12, dtype=torch.int16)}, "qweight is I16"),
        ({f"{Q}.qzeros": torch.zeros(2, 12, dtype=torch.int32)}, r"qzeros is I32 \(2, 12\), wanted I32 \(3, 12\)"),
        ({f"{Q}.scales": torch.ones(3, 95).half()}, r"scales is F16 \(3, 95\)"),
        ({f"{Q}.scales": torch.full((3, 96), float("inf")).half()}, "damaged: scales must be finite"),
        (
            {f"{Q}.scales": torch.ones(49, 96), f"{Q}.qzeros": torch.zeros(49, 12, dtype=torch.int32)},
            "scales has 49 groups, which 96 columns do not make",
        ),
    ],
    ids=str,
)
def test_damage_is_one_line(whole, tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message) as caught:
        quantize(edited(whole, tmp_path / "model", tensors), tmp_path / "store")
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("stated", "tensors", "message"),
    [
        ({"version": "gemv"}, {}, "version 'gemv', which is not supported: give the checkpoint in the layout gemm"),
        ({"version": "GEMV_FAST"}, {}, "'GEMV_FAST'"),
        ({"format": "marlin"}, {}, "format 'marlin'"),
        ({"backend": "llm-awq"}, {}, "backend 'llm-awq'"),
        ({"bits": 3}, {}, "3 bits, which is not supported: give the unquantised model"),
        ({}, {"model.layers.0.mlp.act.scales": torch.ones(4)}, "scaled activations (model.layers.0.mlp.act.scales)"),
    ],
    ids=str,
)
def test_variants_that_are_refused(whole, tmp_path, stated, tensors, message):
    directory = edited(whole, tmp_path / "model", tensors, **settings(**stated))
    with pytest.raises(ValueError, match="quantization_config has .*" + re.escape(message)):
        opened(directory)
