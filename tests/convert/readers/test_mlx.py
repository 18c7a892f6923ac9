"""MLX directories laid out by hand: every weight is what the format's formula makes of it."""

import json
import re

import pytest
import torch
from packed_layouts import mlx_affine, mlx_mxfp4
from packed_models import assert_exact, drawn, edit_config, edited, opened, packed_directory
from safetensors.torch import load_file

from mebp_triton.convert.quantize import quantize
from mebp_triton.kernels.reference import decode
from mebp_triton.store.reader import Store

TABLES = ("model.embed_tokens",)


def settings(group_size=64, bits=4, **more):
    return {"quantization": {"group_size": group_size, "bits": bits} | more}


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("both", [True, False], ids=["newer", "older"])
def test_weights_are_taken_over_to_the_bit(tmp_path, group_size, dtype, both):
    model, store = tmp_path / "model", tmp_path / "store"
    size = {"hidden_size": 128, "intermediate_size": 384} if group_size == 128 else {"hidden_size": 64}
    size |= {} if group_size == 128 else {"intermediate_size": 192}
    config = settings(group_size)
    config |= {"quantization_config": config["quantization"]} if both else {}
    truth = packed_directory(model, mlx_affine(group_size, dtype=dtype), config, dtype=dtype, extra=TABLES, **size)
    assert "model.embed_tokens" in truth and len(truth) == 15
    report = quantize(model, store)
    assert set(report.taken_over) == truth.keys() == report.errors.keys(), "the table too"
    for name, weight in truth.items():
        info = Store(store).matrices[name]
        assert (info.scheme, info.group_size, info.scale_dtype) == ("affine", group_size, "F16")
        # A code times a scale and a bias are added in float32, which is the one rounding.
        assert torch.equal(decode(Store(store).weight(name), torch.float32), weight.float()), name
        assert torch.equal(decode(Store(store).weight(name)), weight), name
    assert not {"quantization", "quantization_config"} & json.loads((store / "config.json").read_text()).keys()


def test_an_untied_head_and_biases_of_the_layers(tmp_path):
    size = {"hidden_size": 64, "intermediate_size": 192}
    truth = packed_directory(tmp_path / "model", mlx_affine(), settings(), "qwen2", head=True, extra=TABLES, **size)
    assert "lm_head" in truth
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "affine", "F16", {64})
    held = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(Store(tmp_path / "store").float_tensor(name), held[name])


def test_scales_that_float16_cannot_hold(tmp_path):
    def layout(module, rows, columns):
        parts, _ = mlx_affine(32)(module, rows, columns)
        parts["scales"] = parts["scales"] * 2.0**-20
        codes = torch.from_numpy(drawn(module, rows, columns, 32, False).codes)
        scales, biases = (parts[name].double().repeat_interleave(32, 1) for name in ("scales", "biases"))
        return parts, codes * scales + biases

    size = {"hidden_size": 64, "intermediate_size": 192}
    truth = packed_directory(tmp_path / "model", layout, settings(32), **size)
    quantize(tmp_path / "model", tmp_path / "store")
    for name, weight in truth.items():
        assert Store(tmp_path / "store").matrices[name].scale_dtype == "F32"
        assert torch.equal(decode(Store(tmp_path / "store").weight(name)), weight)


def test_single_layers_may_have_other_widths_groups_or_none(tmp_path):
    def form_of(module):
        kind = module.rpartition(".")[2]
        return {"q_proj": (3, 64), "up_proj": (6, 64), "gate_proj": (5, 32), "down_proj": (8, 64)}.get(kind, (4, 32))

    own = {"model.layers.0.mlp.up_proj": {"bits": 6, "group_size": 64}, "lm_head": False}
    size = {"hidden_size": 64, "intermediate_size": 192}
    truth = packed_directory(tmp_path / "model", mlx_affine(of=form_of), settings(32, **own), "qwen2", **size)
    source = opened(tmp_path / "model")
    for name, weight in truth.items():
        read, (bits, group_size) = source.read(f"{name}.weight"), form_of(name)
        assert read.bits == (4 if bits <= 4 else 8) and read.group_size == group_size
        assert torch.equal(decode(read), weight)


def test_mxfp4(tmp_path):
    size = {"hidden_size": 64, "intermediate_size": 192}
    truth = packed_directory(tmp_path / "model", mlx_mxfp4, settings(32, mode="mxfp4"), extra=TABLES, **size)
    quantize(tmp_path / "model", tmp_path / "store")
    for name, weight in truth.items():
        found = Store(tmp_path / "store").weight(name)
        assert found.scheme == "codebook" and torch.equal(decode(found), weight), name
        assert torch.equal(decode(found).signbit(), weight.signbit()), "zeros have signs"
    dtypes = {info.scale_dtype for info in Store(tmp_path / "store").matrices.values()}
    assert dtypes == {"F16"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory that tests copy."""
    directory = tmp_path_factory.mktemp("mlx") / "model"
    packed_directory(directory, mlx_affine(), settings(), hidden_size=64, intermediate_size=192)
    return directory


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.weight": None}, f"lacks {Q}.weight"),
        ({f"{Q}.scales": None}, f"{Q}.weight is U32, wanted one of F64"),
        ({f"{Q}.biases": None}, f"{Q}.scales is BF16"),
        ({f"{Q}.weight": torch.zeros(64, 9, dtype=torch.uint32)}, f"{Q}.weight has 9 words along dimension 1"),
        ({f"{Q}.weight": torch.zeros(64, 8)}, f"{Q}.weight is F32"),
        ({f"{Q}.weight": torch.zeros(63, 8, dtype=torch.uint32)}, r"is U32 \(63, 8\), wanted U32 \(64, 8\)"),
        ({f"{Q}.scales": torch.ones(64, 3)}, "scales has 3 groups, into which 64 columns do not fall"),
        ({f"{Q}.biases": torch.ones(64, 2)}, r"biases is F32 \(64, 2\)"),
        ({f"{Q}.biases": torch.full((64, 1), float("nan"))}, "damaged: minimum must be finite"),
        (
            {f"{Q}.biases": None, f"{Q}.scales": torch.zeros(64, 4, dtype=torch.uint8)},
            "scales is for codes of 4 bits in groups of 16, and MXFP4 has 4 bits in groups of 32",
        ),
        (
            {f"{Q}.biases": None, f"{Q}.scales": torch.full((64, 2), 255, dtype=torch.uint8)},
            "damaged: scales must be finite",
        ),
    ],
    ids=str,
)
def test_damage_is_one_line(whole, tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message) as caught:
        quantize(edited(whole, tmp_path / "model", tensors), tmp_path / "store")
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8", ["affine"]])
def test_modes_that_are_refused(whole, tmp_path, mode, layer):
    directory = edited(whole, tmp_path / "model", {})
    edit_config(directory, **settings(**({Q: {"mode": mode}} if layer else {"mode": mode})))
    message = f"quantization has mode {mode!r}, which is not supported: give the unquantised model"
    with pytest.raises(ValueError, match=re.escape(message)):
        opened(directory)
