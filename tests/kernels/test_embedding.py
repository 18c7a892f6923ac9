"""Rows of a packed table have the bits of the decoded table's rows."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import DTYPES
from pairs import pairs

from mebp_triton.kernels import reference
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.embedding import int4_embedding_triton
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import FORMS

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.fixture
def check(guarded):
    """Runs the kernel, compares its rows to the bit, and returns them."""

    def run(ids, weight, dtype=torch.float32, config=None):
        rows = guarded(int4_embedding_triton, ids, weight, dtype, config)
        assert rows.dtype == dtype
        assert torch.equal(rows, reference.embedding(ids, weight, dtype))
        return rows

    return run


SCALE_DTYPES = (torch.float16, torch.float32, torch.int8)


@pytest.mark.parametrize(("dtype", "form", "scale_dtype"), pairs(DTYPES, FORMS, SCALE_DTYPES), ids=str)
def test_every_byte(check, every_byte, dtype, form, scale_dtype, device):
    weight = every_byte(form.group_size, form.scheme, scale_dtype, form.bits)
    check(torch.arange(8, device=device), weight, dtype)


@pytest.mark.parametrize(
    ("size", "form", "dtype"),
    pairs([(1, 1), (3, 31), (70, 33), (17, 64), (5, 200), (40, 449)], FORMS, DTYPES),
    ids=str,
)
def test_odd_sizes(check, make_weight, dtype, form, size, device):
    ids = torch.randint(0, size[0], (19,), generator=torch.Generator().manual_seed(0)).to(device)
    check(ids, make_weight(*size, form.group_size, form.scheme, bits=form.bits), dtype)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (4, 5), (2, 3, 4), (129,)])
def test_shapes_of_ids(check, make_weight, shape, device):
    weight = make_weight(50, 70)
    rows = check(torch.randint(0, 50, shape).to(device), weight)
    assert rows.shape == (*shape, 70)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.int8], ids=str)
def test_strides(check, make_weight, scheme, scale_dtype, device):
    weight = make_weight(60, 70, 32, scheme, scale_dtype)
    ids = torch.randint(0, 30, (8, 9)).to(device)
    check(ids.t(), weight)
    check(ids[::2, ::3], weight)
    check(ids[:1].expand(5, 9), weight)
    check(ids, weight.rows(7, 40))
    check(ids, weight.gather(torch.randperm(60).to(device)))


@pytest.mark.parametrize(
    ("block_k", "form", "scale_dtype"), pairs([64, 128, 256, 512], FORMS, [torch.float16, torch.int8]), ids=str
)
def test_every_tile_gives_the_answer(check, make_weight, form, scale_dtype, block_k, device):
    ids = torch.randint(0, 20, (33,)).to(device)
    weight = make_weight(20, 330, form.group_size, form.scheme, scale_dtype, bits=form.bits)
    check(ids, weight, config=TileConfig(32, 16, block_k))


def test_a_tile_that_goes_on_behind_the_last_chunk(check, make_weight, kind, device):
    weight = make_weight(7, 192, 64, kind.scheme, bits=kind.bits)
    check(torch.arange(7, device=device), weight, config=TileConfig(16, 16, 128))


def test_padding_is_not_read(check, make_weight, kind, device):
    weight = make_weight(20, 70, 32, kind.scheme, bits=kind.bits)
    for tensor in (weight.scales, weight.minimum):
        if tensor is not None:
            tensor[3] = float("nan")
    check(torch.arange(20, device=device), weight)


def test_ids_out_of_range_give_nan(guarded, make_weight, device):
    weight = make_weight(10, 70)
    ids = torch.tensor([0, -1, 9, 10, 2**40, -(2**62), 3], device=device)
    rows = guarded(int4_embedding_triton, ids, weight, torch.float32)
    good = (ids >= 0) & (ids < 10)
    assert rows[~good].isnan().all()
    assert torch.equal(rows[good], reference.embedding(ids[good], weight, torch.float32))


def test_offsets_beyond_31_bits(check, make_weight, sparse, device):
    if device == "cuda":
        pytest.skip("addresses without memory behind them exist on the CPU only")
    small = make_weight(5, 64)
    far = sparse(4 * 2**30 + 32).as_strided((5, 32), (2**30, 1))
    far.copy_(small.packed)
    ids = torch.tensor([4, 0, 3])
    assert torch.equal(check(ids, Int4Weight(far, small.scales, 64, 64)), check(ids, small))


def test_mistakes_are_named(make_weight, device):
    weight, ids = make_weight(10, 64), torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="ids must be int64, got torch.float32"):
        int4_embedding_triton(ids.float(), weight, torch.float32)
    with pytest.raises(ValueError, match="ids must be on .* got meta"):
        int4_embedding_triton(ids.to("meta"), weight, torch.float32)
    with pytest.raises(ValueError, match="dtype must be one of .* got torch.int8"):
        int4_embedding_triton(ids, weight, torch.int8)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 80),
    k=st.integers(1, 200),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 9),
)
def test_any_shape(check, make_weight, device, m, n, k, form, seed):
    ids = torch.randint(0, n, (m,), generator=torch.Generator().manual_seed(seed)).to(device)
    check(ids, make_weight(n, k, form.group_size, form.scheme, seed=seed, bits=form.bits), torch.float16)
