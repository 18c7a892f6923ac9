"""``dX = dY·W + g·a`` against float64 on the decoded codes."""

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
from mebp_triton.kernels.matmul_dx import int4_matmul_dx_group_triton, int4_matmul_dx_triton
from mebp_triton.kernels.names import FORMS, GROUP_SIZES, SCHEMES

pytestmark = pytest.mark.usefixtures("triton_kernels")

# Tensors that lie in memory the other way round: each has strides of its own.
TURNS = (("packed", "scales"), ("super_scales", "minimum"), ("scales", "super_minimum"))


@pytest.fixture
def check(guarded, assert_accurate):
    """Runs the kernel, compares dX with the truth, and returns it."""

    def run(dy, weight, g=None, a=None, config=None):
        dx = guarded(int4_matmul_dx_triton, dy, weight, g, a, config)
        wide = [None if operand is None else operand.double() for operand in (g, a)]
        truth = reference.matmul_dx(dy.double(), weight, *wide)
        assert_accurate("dx", dx, sequential.matmul_dx([dy], [weight], g, a), truth)
        return dx

    return run


@pytest.mark.parametrize(("dtype", "form"), pairs(DTYPES, FORMS), ids=str)
def test_every_form(check, make_weight, normal, dtype, form):
    m, n, k, r = 33, 70, 200, 5
    g, a = normal(m, r, dtype=dtype, seed=2), normal(r, k, dtype=dtype, seed=3)
    check(normal(m, n, dtype=dtype), make_weight(n, k, form.group_size, form.scheme, bits=form.bits), g, a)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129])
def test_token_counts(check, make_weight, normal, dtype, m):
    dx = check(normal(m, 19, dtype=dtype), make_weight(19, 72))
    assert dx.shape == (m, 72)


@pytest.mark.parametrize(
    ("n", "k"), [(1, 64), (5, 1), (3, 33), (65, 31), (63, 65), (64, 64), (130, 127), (17, 192), (2, 449)]
)
def test_odd_sizes(check, make_weight, normal, dtype, n, k):
    for form in FORMS[::4]:
        check(normal(40, n, dtype=dtype), make_weight(n, k, form.group_size, form.scheme, bits=form.bits))


@pytest.mark.parametrize("rank", [1, 2, 8, 15, 16, 17, 33, 64])
def test_ranks(check, make_weight, normal, dtype, rank):
    g, a = normal(18, rank, dtype=dtype, seed=2), normal(rank, 65, dtype=dtype, seed=3)
    check(normal(18, 21, dtype=dtype), make_weight(21, 65), g, a)


def test_lora_operands_are_rounded_to_the_dtype_of_dy(guarded, make_weight, normal):
    dy, weight = normal(5, 20, dtype=torch.float16), make_weight(20, 64)
    g, a = normal(5, 8, seed=2), normal(8, 64, seed=3)
    mixed = guarded(int4_matmul_dx_triton, dy, weight, g, a)
    assert torch.equal(mixed, guarded(int4_matmul_dx_triton, dy, weight, g.half(), a.half()))


def test_rounded_once(guarded, normal, device):
    """LoRA is added before the rounding, so the low bits of a product that it cancels are left."""
    codes = torch.randint(0, 16, (30, 64), dtype=torch.uint8)
    weight = Int4Weight.from_codes(codes, torch.ones(1, 30, dtype=torch.float16), 64).to(device)
    dy = normal(1, 30, dtype=torch.float16)
    product = reference.matmul_dx(dy.double(), weight)
    assert (product - product.half()).abs().max() > 1e-3
    opposite, one = -product.half(), torch.ones(1, 1, dtype=torch.float16, device=device)
    dx = guarded(int4_matmul_dx_triton, dy, weight, one, opposite)
    torch.testing.assert_close(dx.double(), product + opposite.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int8], ids=str)
def test_other_scales(check, make_weight, normal, dtype, kind, scale_dtype):
    check(normal(17, 35, dtype=dtype), make_weight(35, 330, 32, kind.scheme, scale_dtype, bits=kind.bits))


@pytest.mark.parametrize(
    ("tile", "block_k", "weight_left", "form", "scale_dtype"),
    pairs([(16, 16), (32, 64), (128, 32)], [64, 128, 256, 512], [False, True], FORMS, [torch.float16, torch.int8]),
    ids=str,
)
def test_every_tile_gives_the_answer(check, make_weight, normal, form, scale_dtype, tile, block_k, weight_left):
    dy, g, a = normal(37, 45), normal(37, 4, seed=2), normal(4, 330, seed=3)
    config = TileConfig(*tile, block_k, weight_left=weight_left)
    check(dy, make_weight(45, 330, form.group_size, form.scheme, scale_dtype, bits=form.bits), g, a, config)


@pytest.mark.parametrize(
    "view",
    [
        lambda wide: wide[:20, :70],
        lambda wide: wide[:40:2, 3:73],
        lambda wide: wide[:20, :140:2],
        lambda wide: wide.t()[:20, 1:71],
        lambda wide: wide[:1, :70].expand(20, 70),
        lambda wide: wide[:20, :1].expand(20, 70),
        lambda wide: wide[0, 0].expand(20, 70),
    ],
    ids=["rows", "row-step", "column-step", "transposed", "stride-0-rows", "stride-0-columns", "of-a-sum"],
)
def test_strides_of_dy(check, make_weight, normal, dtype, view):
    dy = view(normal(150, 150, dtype=dtype))
    assert dy.shape == (20, 70)
    check(dy, make_weight(70, 100))


@pytest.mark.parametrize(
    ("scheme", "scale_dtype", "turns"), pairs(SCHEMES, [torch.float16, torch.int8], TURNS), ids=str
)
def test_strides_of_the_others(check, make_weight, normal, scheme, scale_dtype, turns):
    m, n, k, r = 18, 40, 100, 6
    weight = make_weight(2 * n, k, 32, scheme, scale_dtype)
    g, a = normal(r, m).t(), normal(k, 2 * r)[:, ::2].t()
    dy = normal(m, n)
    check(dy, weight.rows(7, 7 + n), g, a)
    check(dy, weight.rows(7, 7 + n).gather(torch.randperm(n).to(dy.device)), g, a)
    turned = {name: tensor.t().contiguous().t() for name, tensor in weight.tensors().items() if name in turns}
    columns_first = replace(weight, **turned)
    dy = normal(m, 2 * n)
    assert torch.equal(check(dy, columns_first), check(dy, weight))


SCALE_DTYPES = (torch.float16, torch.float32, torch.int8)


@pytest.mark.parametrize(("dtype", "form", "scale_dtype"), pairs(DTYPES, FORMS, SCALE_DTYPES), ids=str)
def test_identity_gives_the_decoded_weight_to_the_bit(guarded, every_byte, dtype, form, scale_dtype, device):
    weight = every_byte(form.group_size, form.scheme, scale_dtype, form.bits)
    dx = guarded(int4_matmul_dx_triton, torch.eye(8, dtype=dtype, device=device), weight)
    assert torch.equal(dx, reference.decode(weight, dtype))


def test_padding_is_not_read(guarded, make_weight, normal, dtype, kind):
    n, k = 20, 70
    clean = make_weight(n, k, 32, kind.scheme, bits=kind.bits)
    dirty = make_weight(n, k, 32, kind.scheme, bits=kind.bits)
    if kind.bits == 4:
        dirty.packed[:, 32 + 6 :] ^= 0xFF
        dirty.packed[:, 32 : 32 + 6] ^= 0xF0
    else:
        dirty.packed[:, k:] ^= 0xFF
    for tensor in (dirty.scales, dirty.minimum):
        if tensor is not None:
            tensor[3] = float("nan")
    dy = normal(5, n, dtype=dtype)
    assert torch.equal(guarded(int4_matmul_dx_triton, dy, dirty), guarded(int4_matmul_dx_triton, dy, clean))


def test_a_tile_that_goes_on_behind_the_last_chunk(check, make_weight, normal, kind):
    check(
        normal(5, 7),
        make_weight(7, 192, 64, kind.scheme, bits=kind.bits),
        config=TileConfig(16, 16, 128, weight_left=False),
    )


def test_a_nan_stays_in_its_row(guarded, make_weight, normal):
    dy = normal(5, 20)
    weight = make_weight(20, 100)
    clean = guarded(int4_matmul_dx_triton, dy, weight)
    dy[2, 19] = float("nan")
    dx = guarded(int4_matmul_dx_triton, dy, weight)
    assert dx[2].isnan().all()
    assert torch.equal(dx[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_float16_near_overflow(guarded, assert_accurate, make_weight, normal):
    weight = make_weight(128, 70)
    weight.scales.mul_(5)
    dy = normal(20, 128, dtype=torch.float16)
    truth = reference.matmul_dx(dy.double(), weight)
    dy = (dy * (6e4 / truth.abs().max())).half()
    truth = reference.matmul_dx(dy.double(), weight)
    assert 5.9e4 < truth.abs().max() < 6.5e4
    dx = guarded(int4_matmul_dx_triton, dy, weight)
    assert_accurate("dx", dx, reference.matmul_dx(dy, weight), truth)
    # Twice the input overflows float16. The result must be infinite where torch's is, with its sign, and nowhere else.
    dy = dy * 2
    dx, same = guarded(int4_matmul_dx_triton, dy, weight), reference.matmul_dx(dy, weight)
    assert same.isinf().any() and not same.isinf().all()
    assert torch.equal(dx.isinf(), same.isinf()) and torch.equal(dx[dx.isinf()], same[dx.isinf()])


def test_partial_sums_beyond_float16(guarded, device):
    # 32 rows of weights 4 under gradients of 4e4, then their opposites. Each half overflows float16, the whole is 0.
    codes = torch.full((64, 64), 12, dtype=torch.uint8)
    codes[32:] = 4
    weight = Int4Weight.from_codes(codes, torch.ones(1, 64, dtype=torch.float16), 64).to(device)
    dx = guarded(int4_matmul_dx_triton, torch.full((3, 64), 4e4, dtype=torch.float16, device=device), weight)
    assert torch.equal(dx, torch.zeros_like(dx))


@pytest.mark.gpu
def test_repeats_are_identical(guarded, make_weight, normal, dtype, device):
    if device != "cuda":
        pytest.skip("needs a GPU")
    dy, weight = normal(65, 70, dtype=dtype), make_weight(70, 200)
    g, a = normal(65, 16, dtype=dtype, seed=2), normal(16, 200, dtype=dtype, seed=3)
    first = guarded(int4_matmul_dx_triton, dy, weight, g, a)
    for _ in range(100):
        assert torch.equal(first, guarded(int4_matmul_dx_triton, dy, weight, g, a))


def test_offsets_beyond_31_bits(check, make_weight, normal, sparse, device):
    if device == "cuda":
        pytest.skip("addresses without memory behind them exist on the CPU only")
    small, dy = make_weight(5, 64), normal(5, 5)
    far = sparse(4 * 2**30 + 32).as_strided((5, 32), (2**30, 1))
    far.copy_(small.packed)
    weight = Int4Weight(far, small.scales, 64, 64)
    for strides in ((2**29, 1), (1, 2**29)):
        far_dy = sparse(4 * 2**31 + 20).view(torch.float32).as_strided((5, 5), strides)
        far_dy.copy_(dy)
        assert torch.equal(check(far_dy, weight), check(dy, small))


@pytest.mark.gpu
def test_a_head_of_more_than_31_bits(device):
    if device != "cuda" or torch.cuda.mem_get_info()[1] < 16 * 2**30:
        pytest.skip("needs a GPU with 16 GiB")
    n, k, m = 262_144, 16_384, 8_200
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    weight = Int4Weight(packed, torch.randn(k // 128, n, device=device).half() / 64, k, 128)
    # All but the last 64 gradients of a row are zero, so the truth needs the last rows of the weight only.
    dy = torch.zeros(m, n, dtype=torch.float16, device=device)
    dy[-1, -64:] = torch.randn(64, device=device)
    assert dy.numel() > 2**31
    dx = int4_matmul_dx_triton(dy, weight)
    last = reference.matmul_dx(dy[-1:, -64:].double(), weight.rows(n - 64, n))
    assert (dx[-1:].double() - last).norm() / last.norm() < 5e-4


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"dy": torch.zeros(3, 64)}, r"dy must have shape \(3, 4\), got \(3, 64\)"),
        ({"dy": torch.zeros(3, 4, dtype=torch.int64)}, "dy must be one of .*int64"),
        ({"dy": torch.zeros(3, 4, device="meta")}, "dy must be on .* got meta"),
        ({"g": torch.zeros(3, 2)}, "g and a go together"),
        ({"a": torch.zeros(2, 64)}, "g and a go together"),
        ({"g": torch.zeros(2, 2), "a": torch.zeros(2, 64)}, "g must have shape"),
        ({"g": torch.zeros(3, 2), "a": torch.zeros(3, 64)}, "a must have shape"),
    ],
)
def test_mistakes_are_named(make_weight, replace, message, device):
    operands = {"dy": torch.zeros(3, 4), **replace}
    operands = {name: value if value.device.type == "meta" else value.to(device) for name, value in operands.items()}
    with pytest.raises(ValueError, match=message):
        int4_matmul_dx_triton(weight=make_weight(4, 64), **operands)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 80),
    k=st.integers(1, 200),
    rank=st.integers(0, 20),
    scheme=st.sampled_from(SCHEMES),
    group_size=st.sampled_from(GROUP_SIZES),
    step=st.integers(0, 3),
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
def test_any_shape(
    guarded, make_weight, normal, dtype, m, n, k, rank, scheme, group_size, step, transposed, seed, config
):
    shape = (n, m) if transposed else (m, n)
    if step:
        dy = normal(shape[0], shape[1] * step, dtype=dtype, seed=seed)[:, ::step]
    else:
        dy = normal(shape[0], 1, dtype=dtype, seed=seed).expand(shape)
    dy = dy.t() if transposed else dy
    weight = make_weight(n, k, group_size, scheme, seed=seed)
    g, a = (normal(m, rank, dtype=dtype), normal(rank, k, dtype=dtype, seed=2)) if rank else (None, None)
    wide = (None, None) if g is None or a is None else (g.double(), a.double())
    dx = guarded(int4_matmul_dx_triton, dy, weight, g, a, config)
    truth = reference.matmul_dx(dy.double(), weight, *wide)
    # Weights and outputs are rounded to the dtype, products and sums to float32.
    size = dy.double().abs() @ reference.decode(weight).abs()
    size += 0 if g is None or a is None else g.double().abs() @ a.double().abs()
    bound = (torch.finfo(dtype).eps + (n + rank) * torch.finfo(torch.float32).eps) * size
    assert ((dx.double() - truth).abs() <= bound + torch.finfo(dtype).tiny).all()


def test_both_sides_of_the_dot_give_the_same(make_weight, normal, dtype):
    dy, weight = normal(17, 83, dtype=dtype), make_weight(83, 130)
    left, right = (TileConfig(16, 16, 64, weight_left=side) for side in (True, False))
    found = [int4_matmul_dx_triton(dy, weight, config=config) for config in (left, right)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "config", "scheme", "dtype", "scale_dtype"),
    pairs([(20, 33), (18, 1, 17)], [None, TileConfig(16, 32, 128, split=2)], SCHEMES, DTYPES, SCALE_DTYPES),
    ids=lambda value: "split" if isinstance(value, TileConfig) else str(value),
)
def test_group(guarded, assert_accurate, make_weight, normal, dtype, scheme, scale_dtype, sizes, config):
    m, k, r = 15, 130, 6
    weights = [make_weight(n, k, 64, scheme, scale_dtype, seed=i) for i, n in enumerate(sizes)]
    dys = [normal(m, n, dtype=dtype, seed=i) for i, n in enumerate(sizes)]
    g, a = normal(m, r, seed=3), normal(r, k, seed=4)
    dx = guarded(int4_matmul_dx_group_triton, dys, weights, g, a, config)
    pairs = list(zip(dys, weights, strict=True))
    truth = sum(reference.matmul_dx(dy.double(), weight) for dy, weight in pairs) + g.double() @ a.double()
    assert_accurate("dx", dx, sequential.matmul_dx(dys, weights, g, a), truth)


@pytest.mark.parametrize(
    ("sizes", "split", "scheme"), pairs([(32, 64), (64, 32, 16)], [1, 2, 4], SCHEMES), ids=lambda value: str(value)
)
def test_steps_that_end_with_a_member(guarded, assert_accurate, make_weight, normal, sizes, split, scheme):
    """What a step loads for the next one belongs to another member, to another part of a split, or to nobody."""
    weights = [make_weight(n, 100, 32, scheme, seed=i) for i, n in enumerate(sizes)]
    dys = [normal(5, n, dtype=torch.float16, seed=i) for i, n in enumerate(sizes)]
    dx = guarded(int4_matmul_dx_group_triton, dys, weights, config=TileConfig(16, 16, 64, split=split))
    truth = sum(reference.matmul_dx(dy.double(), weight) for dy, weight in zip(dys, weights, strict=True))
    assert_accurate("dx", dx, sequential.matmul_dx(dys, weights), truth)


def test_group_of_views_with_strides_of_their_own(make_weight, normal):
    whole, other = make_weight(50, 100, 32), make_weight(12, 100, 32, seed=5)
    weights = [whole.rows(7, 27), other, whole.rows(30, 50)]
    wide = normal(9, 100)
    strided = [wide[:, 3:23], normal(9, 12, seed=2), wide[:, 40:60]]
    expanded = [normal(1, 20).expand(9, 20), normal(12, 9).t(), normal(9, 1).expand(9, 20)]
    single = make_weight(1, 100, 32, seed=6)
    # The stride along N of a single column is arbitrary.
    columns = [normal(1, 9).t(), wide[:, 3:23]]
    truth = sum(reference.matmul_dx(dy.double(), w) for dy, w in zip(columns, (single, weights[0]), strict=True))
    for order in (1, -1):
        dx = int4_matmul_dx_group_triton(columns[::order], [single, weights[0]][::order])
        torch.testing.assert_close(dx.double(), truth, rtol=1e-4, atol=1e-4)
    for dys in (strided, expanded):
        truth = sum(reference.matmul_dx(dy.double(), weight) for dy, weight in zip(dys, weights, strict=True))
        torch.testing.assert_close(int4_matmul_dx_group_triton(dys, weights).double(), truth, rtol=1e-4, atol=1e-4)


def test_what_cannot_share_a_launch(make_weight, normal):
    weight = make_weight(20, 100, 32)
    dy = normal(5, 20)
    with pytest.raises(ValueError, match="cannot share a launch"):
        int4_matmul_dx_group_triton([dy, dy], [weight, make_weight(20, 100, 64)])
    with pytest.raises(ValueError, match="1 gradients and 2 weights"):
        int4_matmul_dx_group_triton([dy], [weight, weight])
    with pytest.raises(ValueError, match="one dtype, got torch.float32 and torch.float16"):
        int4_matmul_dx_group_triton([dy, dy.half()], [weight, weight])
