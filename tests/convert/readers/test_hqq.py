"""HQQ's safetensors files laid out by hand: every weight is what the format's formula makes of it."""

import pytest
import torch
from packed_layouts import hqq
from packed_models import assert_exact, edited, opened, packed_directory

from mebp_triton.convert.quantize import quantize
from mebp_triton.kernels.reference import decode

SIZE = {"hidden_size": 128, "intermediate_size": 192}
STATED = {"quantization_config": {"quant_method": "hqq", "quant_config": {"nbits": 4, "group_size": 64, "axis": 1}}}


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("config", [{}, STATED], ids=["hqq", "transformers"])
def test_weights_are_taken_over_to_the_bit(tmp_path, group_size, config):
    """HQQ states nothing in config.json; its groups may go on in the next row, as those of 128 do here."""
    truth = packed_directory(tmp_path / "model", hqq(group_size, encoded=not config), config, **SIZE)
    report = quantize(tmp_path / "model", tmp_path / "store")
    assert set(report.taken_over) == truth.keys() and not report.decoded
    assert_exact(tmp_path / "store", truth, "affine", "F32", {32, 64} if group_size == 64 else {group_size, 64})


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_biases_and_transposed_layers(tmp_path, architecture):
    size = {"n_embd": 128, "n_inner": 256} if architecture == "gpt2" else SIZE
    truth = packed_directory(tmp_path / "model", hqq(), {}, architecture, **size)
    quantize(tmp_path / "model", tmp_path / "store")
    assert_exact(tmp_path / "store", truth, "affine", "F32", {64})


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ({"axis": 0}, "codes in groups of 64 that go over several rows, as HQQ's axis=0 makes them"),
        ({"group_size": 8}, "codes in groups of 8"),
    ],
    ids=str,
)
def test_others_are_decoded_exactly_and_said(tmp_path, options, codes):
    truth = packed_directory(tmp_path / "model", hqq(**options), {}, **SIZE)
    source = opened(tmp_path / "model")
    for name, weight in truth.items():
        assert torch.equal(source.read(f"{name}.weight"), weight.float()), name
    assert set(source.decoded.values()) == {codes}


@pytest.mark.parametrize(("bits", "ours"), [(1, 4), (2, 4), (8, 8)])
def test_other_widths(tmp_path, bits, ours):
    truth = packed_directory(tmp_path / "model", hqq(bits=bits), {}, **SIZE)
    source = opened(tmp_path / "model")
    for name, weight in truth.items():
        read = source.read(f"{name}.weight")
        assert read.bits == ours and torch.equal(decode(read), weight)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory that tests copy."""
    directory = tmp_path_factory.mktemp("hqq") / "model"
    packed_directory(directory, hqq(), {}, **SIZE)
    return directory


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.zero": None}, f"lacks {Q}.zero"),
        ({f"{Q}.scale": None}, f"lacks {Q}.scale"),
        ({f"{Q}.W_q": None}, f"lacks {Q}.weight"),
        ({f"{Q}.W_q": torch.zeros(127, 64, dtype=torch.uint8)}, "which holds no 128 x 128 codes"),
        ({f"{Q}.W_q": torch.zeros(128, 64)}, "W_q as F32 .* wanted U8, which is not supported: give"),
        ({f"{Q}.shape": torch.tensor([64, 256])}, r"has shape \(64, 256\), the model wants \(128, 128\)"),
        ({f"{Q}.scale": torch.ones(128, 1)}, "wanted one for each row or column"),
        ({f"{Q}.zero": torch.ones(128, 1)}, r"zero is F32 \(128, 1\)"),
        ({f"{Q}.scale": torch.full((256, 1), float("nan"))}, "damaged: .* must be finite"),
    ],
    ids=str,
)
def test_damage_is_one_line(whole, tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message) as caught:
        quantize(edited(whole, tmp_path / "model", tensors), tmp_path / "store")
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


def test_pickles_are_not_opened(whole, tmp_path):
    directory = edited(whole, tmp_path / "model", {})
    (directory / "model.safetensors").rename(directory / "qmodel.pt")
    with pytest.raises(
        ValueError, match=r"only pickled weights \(qmodel\.pt\).*HQQ's AutoHQQHFModel\.save_to_safetensors"
    ):
        opened(directory)
