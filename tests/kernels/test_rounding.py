"""Changes that are smaller than a step outlast the rounding to a grid, in the mean and in products."""

import pytest
import torch

from mebp_triton.kernels.accuracy import random_weight
from mebp_triton.kernels.layout import Int4Weight, unpack
from mebp_triton.kernels.names import FORMS
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.kernels.rounding import round_to_grid

HALF = torch.tensor([0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25])
FP4 = torch.cat([HALF, -HALF])  # the order of bitsandbytes


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FORMS, ids=str)
def grid(request):
    scheme, size, bits = request.param
    return quantize_matrix(normal(64, 200), scheme, size, bits=bits)[0]


def low_rank(rows, columns, size):
    return size * normal(rows, 2, seed=1) @ normal(2, columns, seed=2) / 2


def kept(weight, grid, change):
    """The part of a change that is in the difference of two weights: 1 for all of it."""
    found = decode(weight) - decode(grid)
    return float((found * change).sum() / change.double().square().sum())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_small_changes_are_kept_where_the_nearest_code_loses_them(form):
    """A step of 8 bits is a sixteenth of one of 4 bits."""
    grid = quantize_matrix(normal(384, 500), form.scheme, form.group_size, bits=form.bits)[0]
    part = 1 if form.bits == 4 else 1 / 16
    change = low_rank(384, 500, 0.01 * part)
    merged = decode(grid, torch.float32) + change
    rounded, error, outside = round_to_grid(merged, grid)
    assert 0.9 < kept(rounded, grid, change) < 1.1, "some lie at the ends of their group's levels"
    assert 0 < outside < 0.07 < 0.2 < round_to_grid(merged + 400 / part * change, grid).outside < 1
    nearest, _ = quantize_matrix(merged, grid.scheme, grid.group_size, bits=grid.bits)
    assert kept(nearest, grid, change) < 0.1
    distance = (decode(rounded) - merged).norm() / merged.norm()
    assert error == pytest.approx(float(distance), rel=1e-5) and 0 < error < 0.06 * part


def test_nothing_else_changes(grid):
    rounded, error, outside = round_to_grid(decode(grid, torch.float32), grid)
    assert error < 1e-6 and torch.equal(decode(rounded), decode(grid)) and outside == 0
    assert rounded.scales is grid.scales and rounded.minimum is grid.minimum and rounded.codebook is grid.codebook
    if grid.scheme == "symmetric":
        assert torch.equal(rounded.packed, grid.packed), "padding too"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_scales_of_two_levels_are_kept(form):
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    grid = random_weight(64, 600, cpu, form.scheme, form.group_size, torch.int8, generator, form.bits)
    change = low_rank(64, 600, 1e-3 if form.bits == 4 else 1e-4)
    rounded, _, _ = round_to_grid(decode(grid, torch.float32) + change, grid)
    assert 0.8 < kept(rounded, grid, change) < 1.2
    assert all(rounded.tensors()[name] is tensor for name, tensor in grid.tensors().items() if name != "packed")


def test_a_value_becomes_one_of_the_two_levels_beside_it(grid):
    merged = decode(grid, torch.float32) + low_rank(64, 200, 0.8 / 2**grid.bits)
    rounded = decode(round_to_grid(merged, grid)[0], torch.float32)
    group = torch.arange(200) // grid.group_size
    levels = torch.arange(2**grid.bits).repeat(64 * 200, 1).view(64, 200, -1)
    tables = torch.stack(
        [
            decode(
                Int4Weight.from_codes(
                    levels[:, :, code].to(torch.uint8),
                    grid.scales[: int(group[-1]) + 1],
                    grid.group_size,
                    None if grid.minimum is None else grid.minimum[: int(group[-1]) + 1],
                    grid.codebook,
                    grid.bits,
                ),
                torch.float32,
            )
            for code in range(2**grid.bits)
        ],
        -1,
    )
    closer = (tables - merged[..., None]).abs() < (rounded - merged).abs()[..., None] * (1 - 1e-4)
    same_side = (tables > merged[..., None]) == (rounded > merged)[..., None]
    assert not (closer & same_side).any(), "there is a nearer level on the same side"


def test_the_same_call_gives_the_same_codes(grid):
    merged = decode(grid, torch.float32) + low_rank(64, 200, 0.02)
    first, second = (round_to_grid(merged, grid)[0] for _ in range(2))
    assert torch.equal(first.packed, second.packed)


def test_a_codebook_in_another_order_and_a_group_of_zeros():
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    scales = torch.rand(2, 8, generator=torch.Generator().manual_seed(4)) + 0.5
    scales[1, 3] = 0
    grid = Int4Weight.from_codes(codes, scales, 32, codebook=FP4)
    change = torch.full((8, 64), 0.004)
    rounded, *_ = round_to_grid(decode(grid, torch.float32) + change, grid)
    assert not decode(rounded)[3, 32:].any()
    assert 0.2 < kept(rounded, grid, change) < 2.5
    same, error, outside = round_to_grid(decode(grid, torch.float32), grid)
    assert error < 1e-6 and torch.equal(decode(same), decode(grid))


def test_wrong_matrices():
    grid = quantize_matrix(normal(4, 64))[0]
    with pytest.raises(ValueError, match=r"the matrix has shape \(64, 4\), the grid \(4, 64\)"):
        round_to_grid(normal(64, 4), grid)
    with pytest.raises(ValueError, match="must be finite"):
        round_to_grid(torch.full((4, 64), torch.nan), grid)
    zeros = quantize_matrix(torch.zeros(4, 64))[0]
    assert round_to_grid(torch.zeros(4, 64), zeros)[1:] == (0, 0)
    assert unpack(zeros.packed, 64).shape == (4, 64)
