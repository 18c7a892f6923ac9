"""What a form string means, and the bits that are counted."""

import pytest
import torch

from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode


@pytest.fixture
def quantizers(bench_path):
    import quantizers

    return quantizers


@pytest.fixture
def matrix():
    return torch.randn(16, 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        ("symmetric 64 4 float16", 4.25),
        ("affine 32 4 float16", 5.0),
        ("affine 32 4 float32", 6.0),
        ("symmetric 32 8 float16", 8.5),
        ("codebook 128 4 float16", 4.125 + 512 / 4096),  # and 16 levels of float32
    ],
)
def test_our_forms(quantizers, matrix, form, bits):
    found = quantizers.ours(matrix, form)
    scheme, size, width, scale = form.split()
    packed, _ = quantize_matrix(matrix, scheme, int(size), scale_dtype=getattr(torch, scale), bits=int(width))
    assert torch.equal(found.weight, decode(packed, torch.float32))
    assert found.bits == bits * matrix.numel()


@pytest.mark.parametrize(("form", "bits"), [("nf4 64", 4.5), ("fp4 64", 4.5), ("nf4 64 double", 4.125 + 32 / 4096 * 2)])
def test_bitsandbytes(quantizers, matrix, form, bits):
    found = quantizers.bitsandbytes(matrix, form)
    assert found.bits == bits * matrix.numel()
    assert 0.05 < float((found.weight - matrix).norm() / matrix.norm()) < 0.15


def test_the_mix_is_that_of_the_gemma_file(quantizers):
    """llama.cpp made that file of 18 layers; where 256 does not divide its rows, Q8_0 stands for Q6_K."""
    parts = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    names = [f"model.layers.{layer}.{part}" for layer in range(18) for part in parts]
    types = {name: quantizers.type_in_mix("Q4_K_M", name, 18) for name in names}
    assert all(kind == "Q4_K" for name, kind in types.items() if "q_proj" in name)
    for part in ("v_proj", "down_proj"):
        layers = [
            layer for layer in range(18) if types[next(n for n in names if f".{layer}." in n and part in n)] == "Q6_K"
        ]
        assert layers == [0, 1, 4, 7, 10, 13, 15, 16, 17]
    assert quantizers.type_in_mix("Q4_K_M", "model.embed_tokens", 18) == "Q6_K"
    assert quantizers.type_in_mix("IQ4_XS", names[1], 18) == "IQ4_XS"
