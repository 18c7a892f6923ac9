"""What an optimizer does to all parameters at once."""

import math

import pytest
import torch
from torch import nn

from mebp_triton.training.optimizers.tensor_lists import clip, copy_back, in_dtype_of, split_like, total_norm


def parameters(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 400), (5,), ())]
    for parameter in made:
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return [*made, nn.Parameter(torch.zeros(2))]  # the last one has no gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_summed_wide(dtype):
    """In float16 the sum of these squares would overflow, in bfloat16 be off in the third digit."""
    made = parameters(dtype, 1e3)
    truth = math.sqrt(sum(float(p.grad.double().square().sum()) for p in made[:3]))
    found = total_norm(made)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found) == pytest.approx(truth, rel=1e-6)
    assert total_norm(made[3:]) == 0


@pytest.mark.parametrize("limit", [0.5, 1e9, math.inf])
def test_clipping_is_torchs(limit):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    total = total_norm(ours)
    clip(ours, limit, total, float(total))
    assert torch.equal(torch.nn.utils.clip_grad_norm_(theirs, limit), total)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours[:3], theirs[:3], strict=True))


def test_clipping_by_nan():
    made = parameters(torch.float32)
    clip(made, 1.0, torch.tensor(math.nan), math.nan)
    assert made[0].grad.isnan().all()


def test_dtypes_and_back():
    wide, narrow = torch.ones(3), torch.full((3,), 2.0, dtype=torch.bfloat16)
    made = in_dtype_of([wide, wide], [wide, narrow])
    assert made[0] is wide and made[1].dtype == torch.float32 and torch.equal(made[1], 2 * wide)
    made[1].mul_(3)
    copy_back(made, [wide, narrow])
    assert torch.equal(narrow.float(), 6 * wide) and torch.equal(wide, torch.ones(3))


def test_split_like():
    values = torch.arange(3.0)
    views = split_like(values, [[None], [], [None, None]])
    assert [[float(one) for one in group] for group in views] == [[0.0], [], [1.0, 2.0]]
    views[2][1] += 5
    assert values[2] == 7
