"""``Y = X·Wᵀ + bias + t·bᵀ`` against float64 on the decoded codes."""

from dataclasses import replace

import pytest
import sequential
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import DTYPES
from pairs import pairs

from mebp_triton.kernels import reference
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.matmul import int4_matmul_group_triton, int4_matmul_triton
from mebp_triton.kernels.names import FORMS, SCHEMES

pytestmark = pytest.mark.usefixtures("triton_kernels")

# Tensors that lie in memory the other way round: each has strides of its own.
TURNS = (("packed", "scales"), ("super_scales", "minimum"), ("scales", "super_minimum"))


@pytest.fixture
def check(guarded, assert_accurate):
    """Runs the kernel, compares Y with the truth, and returns it."""

    def run(x, weight, bias=None, t=None, b=None, config=None):
        y = guarded(int4_matmul_triton, x, weight, bias, t, b, config)
        wide = [None if operand is None else operand.double() for operand in (bias, t, b)]
        truth = reference.matmul(x.double(), weight, *wide)
        assert_accurate("y", y, sequential.matmul(x, weight, bias, t, b), truth)
        return y

    return run


@pytest.mark.parametrize(("dtype", "form"), pairs(DTYPES, FORMS), ids=str)
def test_every_form(check, make_weight, normal, dtype, form):
    m, n, k, r = 33, 70, 200, 5
    weight = make_weight(n, k, form.group_size, form.scheme, bits=form.bits)
    bias, t, b = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(n,), (m, r), (n, r)]))
    check(normal(m, k, dtype=dtype), weight, bias, t, b)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129])
def test_token_counts(check, make_weight, normal, dtype, m):
    y = check(normal(m, 72, dtype=dtype), make_weight(19, 72))
    assert y.shape == (m, 19)


@pytest.mark.parametrize(
    ("n", "k"), [(1, 64), (5, 1), (3, 33), (65, 31), (63, 65), (64, 64), (130, 127), (17, 192), (2, 449)]
)
def test_odd_sizes(check, make_weight, normal, dtype, n, k):
    for form in FORMS[::4]:
        check(
            normal(40, k, dtype=dtype),
            make_weight(n, k, form.group_size, form.scheme, bits=form.bits),
            normal(n, dtype=dtype),
        )


@pytest.mark.parametrize("rank", [1, 2, 8, 15, 16, 17, 33, 64])
def test_ranks(check, make_weight, normal, dtype, rank):
    t, b = normal(18, rank, dtype=dtype, seed=2), normal(21, rank, dtype=dtype, seed=3)
    check(normal(18, 65, dtype=dtype), make_weight(21, 65), None, t, b)


def test_lora_operands_are_rounded_to_the_dtype_of_x(guarded, make_weight, normal):
    x, weight = normal(5, 64, dtype=torch.float16), make_weight(20, 64)
    t, b, bias = normal(5, 8, seed=2), normal(20, 8, seed=3), normal(20, seed=4)
    mixed = guarded(int4_matmul_triton, x, weight, bias, t, b)
    assert torch.equal(mixed, guarded(int4_matmul_triton, x, weight, bias, t.half(), b.half()))


def test_rounded_once(guarded, normal, device):
    """Bias and LoRA are added before the rounding, so the low bits of a product that they cancel are left."""
    codes = torch.randint(0, 16, (30, 64), dtype=torch.uint8)
    weight = Int4Weight.from_codes(codes, torch.ones(1, 30, dtype=torch.float16), 64).to(device)
    x = normal(1, 64, dtype=torch.float16)
    product = reference.matmul(x.double(), weight)
    assert (product - product.half()).abs().max() > 1e-3
    opposite, one = -product.half(), torch.ones(1, 1, dtype=torch.float16, device=device)
    by_bias = guarded(int4_matmul_triton, x, weight, opposite[0])
    by_lora = guarded(int4_matmul_triton, x, weight, None, one, opposite.t())
    for y in (by_bias, by_lora):
        torch.testing.assert_close(y.double(), product + opposite.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int8], ids=str)
def test_other_scales(check, make_weight, normal, dtype, kind, scale_dtype):
    check(normal(17, 330, dtype=dtype), make_weight(35, 330, 32, kind.scheme, scale_dtype, bits=kind.bits))


@pytest.mark.parametrize(
    ("tile", "block_k", "form", "scale_dtype"),
    pairs([(16, 16), (32, 64), (128, 32)], [64, 128, 256, 512], FORMS, [torch.float16, torch.int8]),
    ids=str,
)
def test_every_tile_gives_the_answer(check, make_weight, normal, form, scale_dtype, tile, block_k):
    x, t, b = normal(37, 330), normal(37, 4, seed=2), normal(45, 4, seed=3)
    weight = make_weight(45, 330, form.group_size, form.scheme, scale_dtype, bits=form.bits)
    check(x, weight, None, t, b, TileConfig(*tile, block_k))


@pytest.mark.parametrize(
    "view",
    [
        lambda wide: wide[:20, :70],
        lambda wide: wide[:40:2, 3:73],
        lambda wide: wide[:20, :140:2],
        lambda wide: wide.t()[:20, 1:71],
        lambda wide: wide[:1, :70].expand(20, 70),
        lambda wide: wide[:20, :1].expand(20, 70),
    ],
    ids=["rows", "row-step", "column-step", "transposed", "stride-0-rows", "stride-0-columns"],
)
def test_strides_of_x(check, make_weight, normal, dtype, view):
    x = view(normal(150, 150, dtype=dtype))
    assert x.shape == (20, 70)
    check(x, make_weight(9, 70))


@pytest.mark.parametrize(
    ("scheme", "scale_dtype", "turns"), pairs(SCHEMES, [torch.float16, torch.int8], TURNS), ids=str
)
def test_strides_of_the_others(check, make_weight, normal, scheme, scale_dtype, turns):
    m, n, r = 18, 40, 6
    weight = make_weight(2 * n, 100, 32, scheme, scale_dtype)
    bias, t, b = normal(2 * n)[::2], normal(r, m).t(), normal(n, 2 * r)[:, ::2]
    x = normal(m, 100)
    check(x, weight.rows(7, 7 + n), bias, t, b)
    check(x, weight.gather(torch.randperm(2 * n)[:n].to(x.device)), bias, t, b)
    turned = {name: tensor.t().contiguous().t() for name, tensor in weight.tensors().items() if name in turns}
    columns_first = replace(weight, **turned)
    assert torch.equal(check(x, columns_first), check(x, weight))


SCALE_DTYPES = (torch.float16, torch.float32, torch.int8)


@pytest.mark.parametrize(("dtype", "form", "scale_dtype"), pairs(DTYPES, FORMS, SCALE_DTYPES), ids=str)
def test_identity_gives_the_decoded_weight_to_the_bit(guarded, every_byte, dtype, form, scale_dtype, device):
    weight = every_byte(form.group_size, form.scheme, scale_dtype, form.bits)
    y = guarded(int4_matmul_triton, torch.eye(64, dtype=dtype, device=device), weight)
    assert torch.equal(y.t(), reference.decode(weight, dtype))


def test_padding_is_not_read(guarded, make_weight, normal, dtype, kind):
    n, k = 20, 70
    clean = make_weight(n, k, 32, kind.scheme, bits=kind.bits)
    dirty = make_weight(n, k, 32, kind.scheme, bits=kind.bits)
    if kind.bits == 4:
        # Column 70 is the seventh of its chunk: low nibbles 6..31 and every high nibble of that chunk are padding.
        dirty.packed[:, 32 + 6 :] ^= 0xFF
        dirty.packed[:, 32 : 32 + 6] ^= 0xF0
    else:
        dirty.packed[:, k:] ^= 0xFF
    for tensor in (dirty.scales, dirty.minimum):
        if tensor is not None:
            tensor[3] = float("nan")
    x = normal(5, k, dtype=dtype)
    assert torch.equal(reference.decode(dirty), reference.decode(clean))
    assert torch.equal(guarded(int4_matmul_triton, x, dirty), guarded(int4_matmul_triton, x, clean))


@pytest.mark.parametrize(("k", "bits"), [(70, 4), (100, 4), (70, 8), (100, 8)])
def test_padding_that_would_overflow_is_not_read(guarded, device, k, bits):
    """Decoded in float16 it is infinite, in either plane, and infinity times the zeros of x would be NaN."""
    codes = torch.full((3, 128), 2**bits - 1, dtype=torch.uint8)
    codes[:, :k] = 2 ** (bits - 1) + 1
    packed = Int4Weight.from_codes(codes, torch.ones(4, 3), 32, bits=bits).packed
    weight = Int4Weight(packed, torch.full((4, 3), 2e4).half(), k, 32).to(device)
    y = guarded(int4_matmul_triton, torch.full((2, k), 2.0**-6, dtype=torch.float16, device=device), weight)
    assert torch.equal(y, torch.full_like(y, k * 2e4 / 64))


def test_a_tile_that_goes_on_behind_the_last_chunk(check, make_weight, normal, kind):
    weight = make_weight(7, 192, 64, kind.scheme, bits=kind.bits)
    check(normal(5, 192), weight, config=TileConfig(16, 16, 128))


def test_a_nan_stays_in_its_row(guarded, make_weight, normal):
    x = normal(5, 100)
    weight = make_weight(20, 100)
    clean = guarded(int4_matmul_triton, x, weight)
    x[2, 99] = float("nan")
    y = guarded(int4_matmul_triton, x, weight)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_float16_near_overflow(guarded, assert_accurate, make_weight, normal):
    weight = make_weight(30, 128)
    x = normal(20, 128, dtype=torch.float16)
    truth = reference.matmul(x.double(), weight)
    x = (x * (6e4 / truth.abs().max())).half()
    truth = reference.matmul(x.double(), weight)
    assert 5.9e4 < truth.abs().max() < 6.5e4
    y = guarded(int4_matmul_triton, x, weight)
    assert_accurate("y", y, reference.matmul(x, weight), truth)
    # Twice the input overflows float16. The result must be infinite where torch's is, with its sign, and nowhere else.
    x = x * 2
    y, same = guarded(int4_matmul_triton, x, weight), reference.matmul(x, weight)
    assert same.isinf().any() and not same.isinf().all()
    assert torch.equal(y.isinf(), same.isinf()) and torch.equal(y[y.isinf()], same[y.isinf()])


def test_partial_sums_beyond_float16(guarded, device):
    # 64 products of 4e4 * 4, then their opposites. The sum of each half overflows float16, and the whole is 0.
    codes = torch.full((16, 128), 12, dtype=torch.uint8)
    codes[:, 64:] = 4
    weight = Int4Weight.from_codes(codes, torch.ones(2, 16, dtype=torch.float16), 64).to(device)
    y = guarded(int4_matmul_triton, torch.full((3, 128), 4e4, dtype=torch.float16, device=device), weight)
    assert torch.equal(y, torch.zeros_like(y))


def test_weights_beyond_float16_behave_as_torch(guarded, device):
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 4)
    weight = Int4Weight.from_codes(codes, torch.full((1, 2), 2e4), 64).to(device)
    x = torch.eye(64, dtype=torch.float16, device=device)[:, :64]
    y, same = guarded(int4_matmul_triton, x, weight), reference.matmul(x, weight)
    assert torch.equal(y.nan_to_num(nan=-1), same.nan_to_num(nan=-1))


@pytest.mark.gpu
def test_repeats_are_identical(guarded, make_weight, normal, dtype, device):
    if device != "cuda":
        pytest.skip("needs a GPU")
    x, weight = normal(65, 200, dtype=dtype), make_weight(70, 200)
    t, b = normal(65, 16, dtype=dtype, seed=2), normal(70, 16, dtype=dtype, seed=3)
    first = guarded(int4_matmul_triton, x, weight, None, t, b)
    for _ in range(100):
        assert torch.equal(first, guarded(int4_matmul_triton, x, weight, None, t, b))


def test_offsets_beyond_31_bits(check, make_weight, normal, sparse, device):
    if device == "cuda":
        pytest.skip("addresses without memory behind them exist on the CPU only")
    small, x = make_weight(5, 64), normal(5, 64)
    far = sparse(4 * 2**30 + 64).as_strided((5, 32), (2**30, 1))
    far.copy_(small.packed)
    weight = Int4Weight(far, small.scales, 64, 64)
    by_columns = sparse(32 * 2**27 + 5).as_strided((5, 32), (1, 2**27))
    by_columns.copy_(small.packed)
    assert torch.equal(check(x, Int4Weight(by_columns, small.scales, 64, 64)), check(x, small))
    far_x = sparse(4 * 2**31 + 64 * 4).view(torch.float32).as_strided((5, 64), (2**29, 1))
    far_x.copy_(x)
    assert torch.equal(check(far_x, weight), check(x, small))


@pytest.mark.gpu
def test_a_head_of_more_than_31_bits(device):
    if device != "cuda" or torch.cuda.mem_get_info()[1] < 16 * 2**30:
        pytest.skip("needs a GPU with 16 GiB")
    n, k, m = 262_144, 16_384, 8_200
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    weight = Int4Weight(packed, torch.randn(k // 128, n, device=device).half() / 64, k, 128)
    x = torch.randn(m, k, dtype=torch.float16, device=device)
    y = int4_matmul_triton(x, weight)
    assert y.numel() > 2**31
    last = reference.matmul(x[-64:].double(), weight.rows(n - 64, n))
    assert (y[-64:, -64:].double() - last).norm() / last.norm() < 5e-4


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"x": torch.zeros(3, 65)}, r"x must have shape \(3, 64\), got \(3, 65\)"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "x must be one of .*float64"),
        ({"x": torch.zeros(3, 64, device="meta")}, "x must be on .* got meta"),
        ({"bias": torch.zeros(3)}, "bias must have shape"),
        ({"t": torch.zeros(3, 2)}, "t and b go together"),
        ({"b": torch.zeros(4, 2)}, "t and b go together"),
        ({"t": torch.zeros(2, 2), "b": torch.zeros(4, 2)}, "t must have shape"),
        ({"t": torch.zeros(3, 2), "b": torch.zeros(4, 3)}, "b must have shape"),
    ],
)
def test_mistakes_are_named(make_weight, replace, message, device):
    operands = {"x": torch.zeros(3, 64), **replace}
    operands = {name: value if value.device.type == "meta" else value.to(device) for name, value in operands.items()}
    with pytest.raises(ValueError, match=message):
        int4_matmul_triton(weight=make_weight(4, 64), **operands)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 80),
    k=st.integers(1, 200),
    rank=st.integers(0, 20),
    form=st.sampled_from(FORMS),
    step=st.integers(1, 3),
    transposed=st.booleans(),
    seed=st.integers(0, 9),
    config=st.none()
    | st.builds(
        TileConfig,
        st.sampled_from([16, 32]),
        st.sampled_from([16, 32]),
        st.sampled_from([64, 128]),
        split=st.sampled_from([1, 2, 4]),
        weight_left=st.booleans(),
    ),
)
def test_any_shape(guarded, make_weight, normal, dtype, m, n, k, rank, form, step, transposed, seed, config):
    x = normal(k * step, m, dtype=dtype, seed=seed)[::step].t() if transposed else normal(m, k * step, dtype=dtype)
    x = x if transposed else x[:, ::step]
    weight = make_weight(n, k, form.group_size, form.scheme, seed=seed, bits=form.bits)
    t, b = (normal(m, rank, dtype=dtype), normal(n, rank, dtype=dtype, seed=2)) if rank else (None, None)
    wide = (None, None) if t is None or b is None else (t.double(), b.double())
    y = guarded(int4_matmul_triton, x, weight, None, t, b, config)
    truth = reference.matmul(x.double(), weight, None, *wide)
    # Weights and outputs are rounded to the dtype, products and sums to float32.
    size = x.double().abs() @ reference.decode(weight).abs().t()
    size += 0 if t is None or b is None else t.double().abs() @ b.double().abs().t()
    bound = (torch.finfo(dtype).eps + (k + rank) * torch.finfo(torch.float32).eps) * size
    assert ((y.double() - truth).abs() <= bound + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize(
    ("sizes", "k", "dtype", "bits", "scale_dtype"),
    pairs([(32, 64), (64, 64), (128, 64), (128, 128)], [1, 33, 64, 97, 330], DTYPES, [4, 8], SCALE_DTYPES[::2]),
    ids=str,
)
def test_scaled_sums(check, make_weight, normal, dtype, sizes, k, bits, scale_dtype):
    group_size, block_k = sizes
    weight = make_weight(19, k, group_size, scale_dtype=scale_dtype, bits=bits)
    check(normal(5, k, dtype=dtype), weight, config=TileConfig(16, 16, block_k, scale_sums=True))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES[::2], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_scaled_sums_give_the_decoded_weight_to_the_bit(
    guarded, every_byte, dtype, group_size, device, bits, scale_dtype
):
    weight = every_byte(group_size, "symmetric", scale_dtype, bits)
    config = TileConfig(64, 16, 64, scale_sums=True)
    y = guarded(int4_matmul_triton, torch.eye(64, dtype=dtype, device=device), weight, config=config)
    assert torch.equal(y.t(), reference.decode(weight, dtype))


def test_scaled_sums_do_not_read_padding(guarded, make_weight, normal, dtype):
    weight, x = make_weight(20, 70, 32), normal(5, 70, dtype=dtype)
    config = TileConfig(16, 16, 64, scale_sums=True)
    clean = guarded(int4_matmul_triton, x, weight, config=config)
    weight.packed[:, 32 + 6 :] ^= 0xFF
    weight.scales[3] = float("nan")
    assert torch.equal(guarded(int4_matmul_triton, x, weight, config=config), clean)


def test_a_configuration_that_does_not_suit_is_refused(make_weight, normal):
    with pytest.raises(ValueError, match="does not suit"):
        weight = make_weight(20, 70, 16, bits=8)
        int4_matmul_triton(normal(5, 70), weight, config=TileConfig(16, 16, 64, scale_sums=True))
    with pytest.raises(ValueError, match="does not suit"):
        int4_matmul_triton(
            normal(5, 70), make_weight(20, 70, scheme="affine"), config=TileConfig(16, 16, 64, scale_sums=True)
        )


@pytest.mark.parametrize(
    ("sizes", "config", "form", "dtype", "scale_dtype"),
    pairs([(20, 33), (18, 1, 17)], [None, TileConfig(16, 32, 128, split=2)], FORMS[::3], DTYPES, SCALE_DTYPES),
    ids=lambda value: "split" if isinstance(value, TileConfig) else str(value),
)
def test_group(guarded, assert_accurate, make_weight, normal, dtype, form, scale_dtype, sizes, config):
    """One launch gives the bits that a launch for each member gives.

    Errors are judged over all members: torch's in a single column of few rows may be as good as none.
    """
    m, k, r = 15, 130, 3
    kind = form.group_size, form.scheme, scale_dtype
    weights = [make_weight(n, k, *kind, seed=i, bits=form.bits) for i, n in enumerate(sizes)]
    x, total = normal(m, k, dtype=dtype), sum(sizes)
    bias, t, b = normal(total, seed=2), normal(m, len(sizes) * r, seed=3), normal(total, r, seed=4)
    found = int4_matmul_group_triton(x, weights, bias, t, b, config)
    start, truths, same = 0, [], []
    for index, (n, weight, y) in enumerate(zip(sizes, weights, found, strict=True)):
        own = bias[start : start + n], t[:, index * r : (index + 1) * r], b[start : start + n]
        alone = guarded(int4_matmul_triton, x, weight, *own, config)
        assert y.is_contiguous() and torch.equal(y, alone)
        assert y.untyped_storage().nbytes() == y.nbytes, "an output that is kept would keep the others"
        truths.append(reference.matmul(x.double(), weight, *(operand.double() for operand in own)))
        same.append(sequential.matmul(x, weight, *own))
        start += n
    assert_accurate("y", *(torch.cat(each, dim=-1) for each in (found, same, truths)))


def test_group_of_views_with_strides_of_their_own(make_weight, normal):
    whole, other = make_weight(50, 100, 32), make_weight(12, 100, 32, seed=5)
    weights = [whole.rows(7, 27), other, whole.rows(30, 50)]
    x = normal(9, 100)
    for weight, y in zip(weights, int4_matmul_group_triton(x, weights), strict=True):
        assert torch.equal(y, int4_matmul_triton(x, weight))
