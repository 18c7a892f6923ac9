"""Blocks of every type give what the gguf package decodes, to the bit, and so do the weights that hold them."""

import warnings

import numpy as np
import pytest
import torch

from mebp_triton.convert.readers import gguf_blocks
from mebp_triton.convert.readers.gguf_blocks import TYPES, read_blocks
from mebp_triton.kernels.names import Form
from mebp_triton.kernels.reference import decode

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

# The form and the dtype of scales, int8 where they have two levels. Random exponents of MXFP4 need float32.
HELD_AS = {
    "Q4_0": (Form("symmetric", 32), torch.float16),
    "Q4_1": (Form("affine", 32), torch.float16),
    "Q5_0": (Form("symmetric", 32, 8), torch.float16),
    "Q5_1": (Form("affine", 32, 8), torch.float16),
    "Q8_0": (Form("symmetric", 32, 8), torch.float16),
    "Q4_K": (Form("affine", 32), torch.int8),
    "Q5_K": (Form("affine", 32, 8), torch.int8),
    "Q6_K": (Form("symmetric", 16, 8), torch.int8),
    "IQ4_NL": (Form("codebook", 32), torch.float16),
    "IQ4_XS": (Form("codebook", 32), torch.int8),
    "MXFP4": (Form("codebook", 32), torch.float32),
}


def random_bytes(kind, rows=61, blocks=3):
    """Any bytes: scales of every size and sign, subnormal ones, infinities and NaN."""
    data = np.random.default_rng(7).integers(0, 256, (rows, blocks * TYPES[kind].nbytes), dtype=np.uint8)
    if kind == "MXFP4":  # every exponent that means a number
        exponents = np.arange(rows * blocks, dtype=np.uint16).reshape(rows, blocks) * 7 % 253
        data.reshape(rows, blocks, -1)[..., 0] = exponents
    return data


def matrix_of(kind, data):
    columns = data.shape[1] // TYPES[kind].nbytes * TYPES[kind].weights
    return read_blocks(kind, (len(data), columns), lambda start, stop: torch.from_numpy(data[start:stop]))


def truth(kind, data):
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))


def assert_same_bits(found, wanted):
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert torch.equal(found.isnan(), wanted.isnan())
    assert not wanted.isnan().all()
    bits = (found.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), wanted.clone())
    bits[1][wanted.isnan()] = 0.0
    assert torch.equal(bits[0].view(torch.int32), bits[1].view(torch.int32))


@pytest.mark.parametrize("kind", TYPES)
def test_every_value_is_that_of_the_gguf_package(kind, monkeypatch):
    block = TYPES[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (block.weights, block.nbytes)
    data = random_bytes(kind)
    wanted = truth(kind, data)
    matrix = matrix_of(kind, data)
    assert int(matrix.codes.max()) < 1 << block.bits and matrix.bits == block.bits
    assert matrix.group_size == (16 if kind == "Q6_K" else 32)
    assert_same_bits(matrix.decode(), wanted)
    # The same in panels of ten rows, the last of which has one.
    monkeypatch.setattr(gguf_blocks, "PANEL_ELEMENTS", 9 * 3 * block.weights)
    assert_same_bits(matrix_of(kind, data).decode(), wanted)


@pytest.mark.parametrize("kind", TYPES)
def test_a_weight_of_ours_has_every_value(kind):
    data = random_bytes(kind)
    data = data[truth(kind, data).isfinite().all(1).numpy()]  # NaN needs float32: it equals no float16
    weight = matrix_of(kind, data).to_int4()
    assert_same_bits(decode(weight, torch.float32), truth(kind, data))
    assert (weight.form, weight.scales.dtype) == HELD_AS[kind]


@pytest.mark.parametrize("kind", TYPES)
def test_zeros_keep_their_signs(kind):
    """Scales of both zeros, with steps and minima of zero among others."""
    data = random_bytes(kind, rows=8)
    blocks = data.reshape(8, 3, -1)
    halves = {"Q6_K": (208,), "MXFP4": ()}.get(kind, (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,))
    for number, place in enumerate(halves):
        zeros = np.array([[0.0], [-0.0]] * (2 * (number + 1)), np.float16).repeat(2 // (number + 1), axis=0)[:8]
        blocks[:, :, place : place + 2] = zeros.view(np.uint8).reshape(8, 1, 2)
    if kind in ("Q4_K", "Q5_K"):
        blocks[:4, :, 4:16] = 0
    wanted = truth(kind, data)
    assert wanted.signbit().any() and (wanted == 0).any()
    assert_same_bits(matrix_of(kind, data).decode(), wanted)


def of_exponents(*exponents):
    data = np.random.default_rng(1).integers(0, 256, (len(exponents), 17), dtype=np.uint8)
    data[:, 0] = exponents
    return data


@pytest.mark.parametrize(
    ("exponents", "dtype"),
    [((103, 142), torch.float16), ((102, 120), torch.float32), ((120, 143), torch.float32), ((0, 252), torch.float32)],
)
def test_exponents_become_halves_where_halves_hold_them(exponents, dtype):
    data = of_exponents(*exponents)
    weight = matrix_of("MXFP4", data).to_int4()
    assert weight.scales.dtype == dtype
    assert_same_bits(decode(weight, torch.float32), truth("MXFP4", data))


@pytest.mark.parametrize("exponent", [253, 254, 255])
def test_an_exponent_whose_values_are_no_numbers(exponent):
    matrix = matrix_of("MXFP4", of_exponents(120, exponent))
    assert matrix.scales.isnan().tolist() == [[False, True]]
