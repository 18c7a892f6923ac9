"""The rotary kernel against plain torch, to the bit; its gradient; layouts of q and k; a part of the columns."""

import pytest
import torch
from interpreted import DTYPES
from pairs import pairs
from small_operations import check, results

from mebp_triton.kernels import reference
from mebp_triton.kernels.rope import rope, rope_triton, takes

pytestmark = pytest.mark.usefixtures("triton_kernels")
# (B, heads of q, heads of k, T, D, R)
SIZES = ((2, 4, 2, 5, 16, 16), (1, 3, 1, 1, 24, 24), (2, 2, 2, 3, 11, 10), (1, 9, 9, 2, 256, 256), (1, 1, 1, 4, 6, 2))
LAYOUTS = ("heads last", "contiguous", "slices", "column step")


def heads(normal, batch, count, tokens, columns, layout, **kind):
    """``[B, H, T, D]``, as a projection's output is seen by attention, or otherwise."""
    if layout == "contiguous":
        return normal(batch, count, tokens, columns, **kind)
    step = 2 if layout == "column step" else 1
    wide = normal(batch, tokens, count + 2, columns * step, **kind)[..., ::step]
    wide = wide[:, :, 1 : 1 + count] if layout == "slices" else wide[:, :, :count].contiguous()
    return wide.transpose(1, 2)


@pytest.mark.parametrize(
    ("sizes", "layout", "shared", "dtype", "wide"),
    pairs(SIZES, LAYOUTS, [False, True], DTYPES, [False, True]),
    ids=str,
)
def test_as_in_plain_torch(normal, sizes, layout, shared, dtype, wide):
    """cos and sin are random, so that the two halves of their columns differ."""
    batch, heads_q, heads_k, tokens, columns, rotary = sizes
    q = heads(normal, batch, heads_q, tokens, columns, layout, dtype=dtype)
    k = heads(normal, batch, heads_k, tokens, columns, layout, dtype=dtype, seed=2)
    cos, sin = (
        normal(1 if shared else batch, tokens, rotary, dtype=torch.float32 if wide else dtype, seed=seed)
        for seed in (3, 4)
    )
    found = check(rope, reference.rope, [q, k], [cos, sin])
    assert all(map(torch.equal, found[:2], results(reference.rope, [q, k], [cos, sin])[:2]))
    for one in found:
        assert one.transpose(1, 2).is_contiguous(), "a projection would have to copy its gradient"


def test_expanded_angles(normal):
    q = normal(3, 2, 4, 8)
    cos, sin = (normal(1, 4, 8, seed=seed).expand(3, 4, 8) for seed in (2, 3))
    check(rope, reference.rope, [q, q], [cos, sin])


def test_only_the_outputs_are_written(guarded, normal, dtype):
    q, k = normal(2, 5, 3, 20, dtype=dtype), normal(2, 1, 3, 20, dtype=dtype, seed=2)
    cos, sin = normal(2, 3, 12, dtype=dtype, seed=3), normal(2, 3, 12, dtype=dtype, seed=4)
    for inverse in (False, True):
        assert all(one.isfinite().all() for one in guarded(rope_triton, q, k, cos, sin, inverse))


def test_an_empty_batch(normal):
    q = torch.empty(0, 2, 4, 8, device=normal(1).device).requires_grad_(True)
    turned, _ = rope(q, q.detach(), normal(1, 4, 8), normal(1, 4, 8))
    (dq,) = torch.autograd.grad(turned.sum(), q)
    assert turned.shape == dq.shape == q.shape


def test_offsets_beyond_31_bits(normal, sparse, device):
    if device == "cuda":
        pytest.skip("addresses without memory behind them exist on the CPU only")
    q, cos, sin = normal(2, 3, 4, 8), normal(1, 4, 8, seed=2), normal(1, 4, 8, seed=3)
    wanted = rope_triton(q, q, cos, sin)
    for strides in ((2**31, 2**29, 8, 1), (2**29, 8, 2**30, 1)):
        far = sparse(4 * 2**32 + 4096).view(torch.float32).as_strided(q.shape, strides)
        far.copy_(q)
        assert all(map(torch.equal, rope_triton(far, far, cos, sin), wanted))


def test_what_it_takes():
    q, k, cos = torch.zeros(2, 4, 3, 8), torch.zeros(2, 1, 3, 8), torch.zeros(1, 3, 8)
    assert takes(q, k, cos, cos) and takes(q.half(), k.half(), cos, cos) and takes(q, k, cos[..., :6], cos[..., :6])
    for wrong in (
        (q[0], k, cos, cos),
        (q, k[:1], cos, cos),
        (q, k[..., :6], cos, cos),
        (q, k.half(), cos, cos),
        (q, k, cos[0], cos[0]),
        (q, k, cos.double(), cos.double()),
        (q, k, cos, cos[..., :6]),
        (q, k, cos[..., :5], cos[..., :5]),
        (q, k, cos[:, :2], cos[:, :2]),
        (q, k, torch.zeros(1, 3, 10), torch.zeros(1, 3, 10)),
        (q, k, cos, cos.clone().requires_grad_(True)),
        (q.double(), k.double(), cos, cos),
    ):
        assert not takes(*wrong)
