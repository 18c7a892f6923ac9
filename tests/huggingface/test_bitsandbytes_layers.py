"""bitsandbytes' 4-bit layers are taken over to the bit."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import bitsandbytes
import pytest
import torch
from models import relative_rms

from mebp_triton.huggingface.bitsandbytes_layers import check_linear4bit, int4_from_linear4bit, is_linear4bit
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.lora_function import int4_lora_linear

ROWS = 48


def linear4bit(columns: int, quant_type: str = "nf4", nested: bool = True, **options: Any) -> Any:
    torch.manual_seed(columns)
    layer = bitsandbytes.nn.Linear4bit(
        columns, ROWS, compute_dtype=torch.float32, compress_statistics=nested, quant_type=quant_type, **options
    )
    # Rows of very different sizes: a scale of the wrong row would show.
    layer.weight.data.normal_().mul_(torch.logspace(-2, 1, ROWS).unsqueeze(1))
    return layer.to("cpu").train()


def flat_decoding(layer: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decodes by bitsandbytes' definition: codes in order, high nibble first; a scale per block of the flat matrix."""
    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    flat = layer.weight.data.view(torch.uint8).flatten()
    codes = torch.stack((flat >> 4, flat & 15), dim=1).flatten()
    values = state.code.to(dtype)[codes.int()] * absmax.to(dtype).repeat_interleave(state.blocksize)[: codes.numel()]
    return values.view(ROWS, -1)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 64), (128, 64), (192, 64), (96, 32), (160, 32)])
def test_the_weight_is_bitsandbytes_own(columns: int, group_size: int, quant_type: str, nested: bool) -> None:
    layer = linear4bit(columns, quant_type, nested)
    assert is_linear4bit(layer)
    check_linear4bit(layer, "layer")
    expected = flat_decoding(layer)
    if columns % 64 == 0:  # for other widths its CPU kernel (0.50) takes scales of other blocks
        dequantized = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(expected, dequantized)
    weight = int4_from_linear4bit(layer)
    assert weight.scheme == "codebook" and weight.group_size == group_size
    assert torch.equal(decode(weight, torch.float32), expected)


def test_other_blocks_and_storage() -> None:
    for blocksize, group_size in ((128, 128), (256, 128)):
        layer = linear4bit(256)
        data = torch.randn(ROWS, 256)
        layer.weight = bitsandbytes.nn.Params4bit(data, blocksize=blocksize, quant_type="nf4", module=layer).to("cpu")
        expected = flat_decoding(layer)
        weight = int4_from_linear4bit(layer)
        assert weight.group_size == group_size and torch.equal(decode(weight, torch.float32), expected)
    layer = linear4bit(64, quant_storage=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(flat_decoding(layer), decode(int4_from_linear4bit(layer), torch.float32))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("columns", [96, 128])
def test_gradients_in_float64(columns: int, quant_type: str) -> None:
    layer = linear4bit(columns, quant_type)
    truth = flat_decoding(layer, torch.float64)
    weight = int4_from_linear4bit(layer)
    inputs = (torch.randn(2, 7, columns), layer.bias.detach(), torch.randn(4, columns), torch.randn(ROWS, 4))
    x, bias, a, b = (tensor.double().requires_grad_() for tensor in inputs)
    dy = torch.randn(2, 7, ROWS).double()
    expected = torch.autograd.grad(x @ (truth + 0.5 * b @ a).t() + bias, (x, bias, a, b), dy)
    found = torch.autograd.grad(int4_lora_linear(x, weight, bias, a, b, 0.5), (x, bias, a, b), dy)
    assert max(relative_rms(ours, own) for ours, own in zip(found, expected, strict=True)) < 1e-13
    x, bias, a, b = (tensor.clone().requires_grad_() for tensor in inputs)
    found = torch.autograd.grad(int4_lora_linear(x, weight, bias, a, b, 0.5), (x, bias, a, b), dy.float())
    assert max(relative_rms(ours, own) for ours, own in zip(found, expected, strict=True)) < 1e-6


def test_what_cannot_be_exact_is_refused() -> None:
    with pytest.raises(ValueError, match="q_proj: in_features=80 is not a multiple of 32.*exclude_modules"):
        check_linear4bit(linear4bit(80), "q_proj")
    with pytest.raises(ValueError, match="not quantised yet"):
        check_linear4bit(bitsandbytes.nn.Linear4bit(64, ROWS), "q_proj")
    # On a CPU with AVX512-BF16 its forward pass in eval mode does this. It packs 32 rows at a time, so 64 are taken.
    wide = bitsandbytes.nn.Linear4bit(64, 64).to("cpu")
    packed, state = bitsandbytes.functional._convert_weight_packed_for_cpu(wide.weight.data, wide.weight.quant_state)
    wide.weight.data, wide.weight.quant_state = packed, state
    with pytest.raises(ValueError, match="rounded this layer's scales to bfloat16"):
        check_linear4bit(wide, "q_proj")
    wide.state_dict()  # unpacks it, without the scales' lost bits
    with pytest.raises(ValueError, match="rounded this layer's scales to bfloat16"):
        check_linear4bit(wide, "q_proj")


def test_the_old_weight_goes_with_its_layer() -> None:
    layer = linear4bit(64)
    old = weakref.ref(layer.weight)
    gc.disable()
    try:
        int4_from_linear4bit(layer)
        del layer
        assert old() is None
    finally:
        gc.enable()
