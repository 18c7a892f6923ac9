"""The plain twins against the same formulas written a second time, element by element in Python's floats."""

import math

import pytest
import torch
from pairs import pairs

from mebp_triton.kernels import reference
from mebp_triton.kernels.layout import Int4Weight, unpack
from mebp_triton.kernels.names import FORMS

SIZES = ((1, 1), (3, 31), (2, 65), (5, 96), (4, 130), (3, 256), (2, 321))
SCALES = (torch.float16, torch.float32, torch.int8)


def naive_decode(weight: Int4Weight) -> torch.Tensor:
    """Decodes one element at a time from the bytes, with the layout's arithmetic written out."""
    rows, columns = weight.shape
    packed = weight.packed.tolist()
    scales, minimum, super_scales, super_minimum = (
        None if tensor is None else tensor.tolist()
        for tensor in (weight.scales, weight.minimum, weight.super_scales, weight.super_minimum)
    )
    codebook = None if weight.codebook is None else weight.codebook.tolist()
    decoded = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            if weight.bits == 8:
                code, middle = packed[n][k], 128
            else:
                byte, middle = packed[n][k // 64 * 32 + k % 32], 8
                code = byte % 16 if k % 64 < 32 else byte // 16
            scale = scales[k // weight.group_size][n] * (super_scales[k // 256][n] if super_scales else 1)
            if codebook is not None:
                decoded[n, k] = codebook[code] * scale
            elif minimum is not None:
                least = minimum[k // weight.group_size][n] * (super_minimum[k // 256][n] if super_minimum else 1)
                decoded[n, k] = code * scale + least
            else:
                decoded[n, k] = (code - middle) * scale
    return decoded.to(weight.device)


@pytest.mark.parametrize(("size", "form", "scale_dtype"), pairs(SIZES, FORMS, SCALES), ids=str)
def test_decode(make_weight, form, scale_dtype, size):
    weight = make_weight(*size, form.group_size, form.scheme, scale_dtype, bits=form.bits)
    assert torch.equal(reference.decode(weight), naive_decode(weight))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_rounds_once(make_weight, dtype, bits, scale_dtype):
    weight = make_weight(7, 300, 64, scale_dtype=scale_dtype, bits=bits)
    assert torch.equal(reference.decode(weight, dtype), naive_decode(weight).float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_computes_in_float32(make_weight, scheme, dtype):
    """With float32 scales the product is rounded to float32, and then to bfloat16."""
    weight = make_weight(7, 200, 64, scheme, torch.float32)
    codes, group = unpack(weight.packed, 200), torch.arange(200, device=weight.device) // 64
    scales = weight.scales.t()[:, group]
    if scheme == "codebook":
        expected = weight.codebook[codes.long()] * scales
    elif scheme == "affine":
        expected = codes * scales + weight.minimum.t()[:, group]
    else:
        expected = (codes.float() - 8) * scales
    assert torch.equal(reference.decode(weight, dtype), expected.to(dtype))


def test_the_result_has_the_dtype_of_the_activations(make_weight, normal):
    weight = make_weight(9, 150)
    for dtype, other in ((torch.float64, torch.float32), (torch.bfloat16, torch.float32)):
        x, dy = normal(4, 150, dtype=dtype), normal(4, 9, dtype=dtype)
        bias, t, b, a = (normal(*shape, dtype=other) for shape in ((9,), (4, 3), (9, 3), (3, 150)))
        assert reference.matmul(x, weight, bias, t, b).dtype == reference.matmul(x, weight, bias).dtype == dtype
        assert reference.matmul_dx(dy, weight, t, a).dtype == dtype


@pytest.fixture
def weight(make_weight, scheme, group_size):
    return make_weight(9, 150, group_size, scheme)


@pytest.fixture
def real(normal):
    return lambda *shape, seed: normal(*shape, dtype=torch.float64, seed=seed)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_matmul(weight, real):
    x, bias, t, b = real(4, 150, seed=1), real(9, seed=2), real(4, 3, seed=3), real(9, 3, seed=4)
    w = naive_decode(weight)
    plain = torch.stack([torch.stack([(row * column).sum() for column in w]) for row in x])
    close(reference.matmul(x, weight), plain)
    close(reference.matmul(x, weight, bias), plain + bias)
    adapted = torch.einsum("mr,nr->mn", t, b)
    close(reference.matmul(x, weight, bias, t, b), plain + bias + adapted)
    close(reference.matmul(x, weight, t=t, b=b), plain + adapted)


def test_matmul_with_identity_is_the_weight(weight):
    identity = torch.eye(150, dtype=torch.float64, device=weight.device)
    assert torch.equal(reference.matmul(identity, weight), naive_decode(weight).t())


def test_matmul_dx(weight, real):
    dy, g, a = real(4, 9, seed=1), real(4, 3, seed=2), real(3, 150, seed=3)
    w = naive_decode(weight)
    plain = torch.stack([(row[:, None] * w).sum(0) for row in dy])
    close(reference.matmul_dx(dy, weight), plain)
    close(reference.matmul_dx(dy, weight, g, a), plain + torch.einsum("mr,rk->mk", g, a))


def test_matmul_dx_is_the_gradient_of_matmul(weight, real):
    x, dy = real(4, 150, seed=1).requires_grad_(True), real(4, 9, seed=2)
    t, b = real(4, 3, seed=3), real(9, 3, seed=4)
    (expected,) = torch.autograd.grad(reference.matmul(x, weight, t=t, b=b), x, dy)
    close(reference.matmul_dx(dy, weight), expected)


def test_embedding(weight):
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]], device=weight.device)
    rows = reference.embedding(ids, weight, torch.float64)
    w = naive_decode(weight)
    assert rows.shape == (2, 3, 150)
    for i in range(2):
        for j in range(3):
            assert torch.equal(rows[i, j], w[ids[i, j]])


@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy(weight, real, with_bias):
    hidden, bias = real(5, 150, seed=1) * 0.1, real(9, seed=2) if with_bias else None
    targets = torch.tensor([3, -100, 0, 8, 3], device=weight.device)
    loss, grad, argmax = reference.cross_entropy(hidden, weight, targets, bias)
    w = naive_decode(weight).tolist()
    expected = 0.0
    for i, target in enumerate(targets.tolist()):
        row = hidden[i].tolist()
        logits = [math.fsum(h * v for h, v in zip(row, w[n], strict=True)) for n in range(9)]
        if bias is not None:
            logits = [logit + float(bias[n]) for n, logit in enumerate(logits)]
        assert int(argmax[i]) == logits.index(max(logits))
        if target == -100:
            assert (grad[i] == 0).all()
            continue
        top = max(logits)
        normalizer = math.fsum(math.exp(logit - top) for logit in logits)
        expected += top + math.log(normalizer) - logits[target]
        # The expected row under the softmax, less the target's row.
        softmax = [math.exp(logit - top) / normalizer for logit in logits]
        row_grad = [math.fsum(p * w[n][k] for n, p in enumerate(softmax)) - w[target][k] for k in range(150)]
        torch.testing.assert_close(grad[i].cpu(), torch.tensor(row_grad, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert loss.shape == () and float(loss) == pytest.approx(expected, rel=1e-12)
    assert not loss.requires_grad and not grad.requires_grad and not hidden.requires_grad
    with torch.no_grad():
        assert torch.equal(reference.cross_entropy(hidden, weight, targets, bias)[1], grad)


def test_cross_entropy_without_a_valid_target(weight, real):
    targets = torch.full((2,), 7, device=weight.device)
    loss, grad, _ = reference.cross_entropy(real(2, 150, seed=1), weight, targets, ignore_index=7)
    assert float(loss) == 0 and (grad == 0).all()
