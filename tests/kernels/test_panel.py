"""The operations by panels, against float64 on the decoded codes."""

from contextlib import ExitStack

import pytest
import torch
from allocations import Allocations
from pairs import pairs

from mebp_triton.kernels import panel, reference
from mebp_triton.kernels.layout import CHUNK, Int4Weight, unpack
from mebp_triton.kernels.names import FORMS, GROUP_SIZES, SCHEMES
from mebp_triton.kernels.panel import (
    TILE_ROWS,
    PanelDecoder,
    int4_embedding_panel,
    int4_matmul_dx_group_panel,
    int4_matmul_dx_panel,
    int4_matmul_panel,
    whole_tiles,
)
from mebp_triton.kernels.workspace import Workspace, use_workspace

# Unlike Triton's interpreter, plain torch computes bfloat16 correctly.
ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (torch.float16, torch.float32, torch.int8)


@pytest.fixture(params=ALL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def set_panel_size():
    """``set_panel_size(elements)``: panels have that many elements for the rest of the test, on any device."""
    with ExitStack() as stack:
        yield lambda elements: stack.enter_context(use_workspace(Workspace(elements, elements)))


# A panel of the usual size, and ones of so few rows that dX has to cut N as well.
PANEL_SIZES = (None, 5 * CHUNK)


@pytest.fixture(params=PANEL_SIZES, ids=["one-panel", "small-panels"])
def panel_size(request, set_panel_size):
    if request.param is not None:
        set_panel_size(request.param)


@pytest.fixture(params=[1, 5 * CHUNK, None], ids=lambda size: f"panel-{size}")
def any_panel_size(request, set_panel_size):
    if request.param is not None:
        set_panel_size(request.param)


def check_matmul(assert_accurate, x, weight, bias=None, t=None, b=None):
    y = int4_matmul_panel(x, weight, bias, t, b)
    wide = [None if operand is None else operand.double() for operand in (bias, t, b)]
    truth = reference.matmul(x.double(), weight, *wide)
    assert_accurate("y", y, reference.matmul(x, weight, bias, t, b), truth)
    return y


def check_dx(assert_accurate, dy, weight, g=None, a=None):
    dx = int4_matmul_dx_panel(dy, weight, g, a)
    wide = [None if operand is None else operand.double() for operand in (g, a)]
    assert_accurate("dx", dx, reference.matmul_dx(dy, weight, g, a), reference.matmul_dx(dy.double(), weight, *wide))
    return dx


@pytest.mark.parametrize(
    ("dtype", "form", "scale_dtype", "panel_size"),
    pairs(ALL_DTYPES, FORMS, SCALES, PANEL_SIZES),
    indirect=["panel_size"],
    ids=str,
)
def test_every_form(assert_accurate, make_weight, normal, dtype, form, scale_dtype, panel_size):
    m, n, k, r = 9, 23, 600, 5
    weight = make_weight(n, k, form.group_size, form.scheme, scale_dtype, bits=form.bits)
    shapes = [(n,), (m, r), (n, r), (m, n), (m, r), (r, k)]
    bias, t, b, dy, g, a = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    check_matmul(assert_accurate, normal(m, k, dtype=dtype), weight, bias, t, b)
    check_dx(assert_accurate, dy, weight, g, a)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 500])
def test_token_counts(assert_accurate, make_weight, normal, dtype, m):
    weight = make_weight(19, 72, 32)
    assert check_matmul(assert_accurate, normal(m, 72, dtype=dtype), weight).shape == (m, 19)
    assert check_dx(assert_accurate, normal(m, 19, dtype=dtype), weight).shape == (m, 72)


@pytest.mark.parametrize(
    ("n", "k"), [(1, 64), (5, 1), (3, 33), (65, 31), (63, 65), (64, 64), (130, 127), (17, 192), (2, 449)]
)
def test_odd_sizes(assert_accurate, make_weight, normal, dtype, panel_size, n, k):
    for group_size, scheme in zip(GROUP_SIZES, SCHEMES, strict=True):
        weight = make_weight(n, k, group_size, scheme)
        check_matmul(assert_accurate, normal(40, k, dtype=dtype), weight, normal(n, dtype=dtype))
        g, a = normal(4, 3, dtype=dtype, seed=2), normal(3, k, dtype=dtype, seed=3)
        check_dx(assert_accurate, normal(4, n, dtype=dtype), weight, g, a)


@pytest.mark.parametrize(("n", "k"), [(576, 1536), (4864, 896), (1152, 6912)])
def test_sizes_of_real_models(assert_accurate, make_weight, normal, n, k):
    weight = make_weight(n, k, 128, "affine")
    check_matmul(assert_accurate, normal(7, k), weight)
    check_dx(assert_accurate, normal(7, n), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_reductions_in_half_precision(assert_accurate, make_weight, normal, dtype):
    check_matmul(assert_accurate, normal(2, 16384, dtype=dtype), make_weight(24, 16384))
    check_dx(assert_accurate, normal(2, 16384, dtype=dtype), make_weight(16384, 24))


def test_float16_near_its_limit(assert_accurate, make_weight, normal):
    weight = make_weight(16, 64)
    x = (normal(3, 64) * 1e4).half()
    y = check_matmul(assert_accurate, x, weight)
    assert y.abs().max() > 1e4


@pytest.mark.parametrize("rank", [1, 2, 8, 33, 64])
def test_ranks(assert_accurate, make_weight, normal, dtype, rank):
    weight = make_weight(21, 65)
    t, b = normal(8, rank, dtype=dtype, seed=2), normal(21, rank, dtype=dtype, seed=3)
    check_matmul(assert_accurate, normal(8, 65, dtype=dtype), weight, None, t, b)
    check_dx(assert_accurate, normal(8, 21, dtype=dtype), weight, t, normal(rank, 65, dtype=dtype, seed=4))


def test_operands_of_other_dtypes_are_rounded_to_that_of_x(make_weight, normal, dtype):
    weight = make_weight(20, 70)
    x, bias, t, b = normal(5, 70, dtype=dtype), normal(20), normal(5, 4), normal(20, 4)
    mixed = int4_matmul_panel(x, weight, bias, t, b)
    assert torch.equal(mixed, int4_matmul_panel(x, weight, bias.to(dtype), t.to(dtype), b.to(dtype)))
    dy, a = normal(5, 20, dtype=dtype), normal(4, 70)
    assert torch.equal(
        int4_matmul_dx_panel(dy, weight, t, a), int4_matmul_dx_panel(dy, weight, t.to(dtype), a.to(dtype))
    )


@pytest.mark.parametrize(
    ("dtype", "form", "scale_dtype", "any_panel_size"),
    pairs(ALL_DTYPES, FORMS, SCALES, [1, *PANEL_SIZES]),
    indirect=["any_panel_size"],
    ids=str,
)
def test_identity_gives_the_decoded_weight_bit_for_bit(make_weight, dtype, form, scale_dtype, any_panel_size):
    weight = make_weight(40, 350, form.group_size, form.scheme, scale_dtype, bits=form.bits)
    decoded = reference.decode(weight, dtype)
    assert torch.equal(int4_matmul_panel(torch.eye(350, dtype=dtype, device=decoded.device), weight).t(), decoded)
    assert torch.equal(int4_matmul_dx_panel(torch.eye(40, dtype=dtype, device=decoded.device), weight), decoded)
    everything = torch.arange(40, device=decoded.device)
    assert torch.equal(int4_embedding_panel(everything, weight, dtype), decoded)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.int8], ids=str)
def test_float64_is_computed_in_float64(make_weight, normal, scheme, scale_dtype, panel_size):
    weight = make_weight(23, 200, 32, scheme, scale_dtype)
    x, dy = normal(6, 200, dtype=torch.float64), normal(6, 23, dtype=torch.float64)
    torch.testing.assert_close(int4_matmul_panel(x, weight), reference.matmul(x, weight), rtol=0, atol=1e-12)
    torch.testing.assert_close(int4_matmul_dx_panel(dy, weight), reference.matmul_dx(dy, weight), rtol=0, atol=1e-12)


VIEWS = {
    "rows": lambda wide: wide[:20, :70],
    "row-step": lambda wide: wide[:40:2, 3:73],
    "column-step": lambda wide: wide[:20, :140:2],
    "transposed": lambda wide: wide.t()[:20, 1:71],
    "stride-0-rows": lambda wide: wide[:1, :70].expand(20, 70),
    "stride-0-columns": lambda wide: wide[:20, :1].expand(20, 70),
    "stride-0": lambda wide: wide[:1, :1].expand(20, 70),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(assert_accurate, make_weight, normal, dtype, panel_size, view):
    operand = view(normal(150, 150, dtype=dtype))
    assert operand.shape == (20, 70)
    check_matmul(assert_accurate, operand, make_weight(9, 70))
    check_dx(assert_accurate, operand, make_weight(70, 90))


def test_strides_of_weight_and_lora(assert_accurate, make_weight, normal, scheme, panel_size):
    m, n, r = 6, 20, 4
    weight = make_weight(2 * n, 100, 32, scheme)
    bias, t, b = normal(2 * n)[::2], normal(r, m).t(), normal(n, 2 * r)[:, ::2]
    for part in (weight.rows(7, 7 + n), weight.gather(torch.randperm(2 * n)[:n])):
        check_matmul(assert_accurate, normal(m, 100), part, bias, t, b)
        check_dx(assert_accurate, normal(m, n), part, t, normal(100, r).t())


def test_operands_are_left_as_they_are(make_weight, normal, dtype):
    weight = make_weight(20, 70, 32, "affine")
    operands = {"x": normal(5, 70, dtype=dtype), "bias": normal(20, dtype=dtype), "t": normal(5, 4, dtype=dtype)}
    operands |= {"b": normal(20, 4, dtype=dtype), "dy": normal(5, 20, dtype=dtype), "a": normal(4, 70, dtype=dtype)}
    before = {name: tensor.clone() for name, tensor in (operands | weight.tensors()).items()}
    int4_matmul_panel(operands["x"], weight, operands["bias"], operands["t"], operands["b"])
    int4_matmul_dx_panel(operands["dy"], weight, operands["t"], operands["a"])
    for name, tensor in (operands | weight.tensors()).items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("k", "bits"), [(65, 4), (100, 4), (65, 8), (100, 8)])
def test_what_lies_in_the_padding_of_k_has_no_influence(make_weight, normal, any_panel_size, k, bits):
    weight = make_weight(11, k, 32, "affine", bits=bits)
    codes = torch.full((11, 128), 2**bits - 1, dtype=torch.uint8, device=weight.device)
    codes[:, :k] = unpack(weight.packed, k)
    scales, minimum = torch.full_like(weight.scales, 9e3), torch.full_like(weight.minimum, -5e4)
    groups = -(-k // 32)
    scales[:groups], minimum[:groups] = weight.scales[:groups], weight.minimum[:groups]
    dirty = Int4Weight(Int4Weight.from_codes(codes, scales, 32, minimum, bits=bits).packed, scales, k, 32, minimum)
    x, dy = normal(5, k), normal(5, 11)
    assert torch.equal(int4_matmul_panel(x, dirty), int4_matmul_panel(x, weight))
    assert torch.equal(int4_matmul_dx_panel(dy, dirty), int4_matmul_dx_panel(dy, weight))
    ids = torch.arange(11, device=weight.device)
    assert torch.equal(int4_embedding_panel(ids, dirty, x.dtype), int4_embedding_panel(ids, weight, x.dtype))


def test_results_do_not_change_from_run_to_run(make_weight, normal, dtype, panel_size):
    weight = make_weight(50, 200)
    x, dy, t, b = normal(9, 200, dtype=dtype), normal(9, 50, dtype=dtype), normal(9, 4), normal(50, 4)
    first = int4_matmul_panel(x, weight, None, t, b), int4_matmul_dx_panel(dy, weight)
    for _ in range(10):
        assert torch.equal(int4_matmul_panel(x, weight, None, t, b), first[0])
        assert torch.equal(int4_matmul_dx_panel(dy, weight), first[1])


def test_embedding_shapes(make_weight, dtype, scheme, any_panel_size):
    weight = make_weight(13, 70, 64, scheme)
    for shape in ((0,), (1,), (5,), (2, 3), (0, 4), (2, 0)):
        ids = torch.randint(0, 13, shape, generator=torch.Generator().manual_seed(0)).to(weight.device)
        rows = int4_embedding_panel(ids, weight, dtype)
        assert rows.shape == (*shape, 70)
        assert torch.equal(rows, reference.embedding(ids, weight, dtype))


def test_no_rows(make_weight, normal):
    weight = make_weight(4, 70).rows(2, 2)
    assert int4_matmul_panel(normal(3, 70), weight).shape == (3, 0)
    assert torch.equal(int4_matmul_dx_panel(normal(3, 0), weight), torch.zeros(3, 70, device=weight.device))


def test_plane_order_and_back(normal):
    x = normal(3, 130)
    planes = panel.to_planes(x, 3)
    assert planes.shape == (3, 192)
    assert torch.equal(planes[:, :32], x[:, :32])  # the first chunk's low nibbles
    assert torch.equal(planes[:, 32:64], x[:, 64:96])  # the second chunk's low nibbles
    assert torch.equal(planes[:, 96:128], x[:, 32:64])  # the first chunk's high nibbles
    assert torch.equal(panel.from_planes(planes)[:, :130], x)
    assert not panel.from_planes(planes)[:, 130:].any()


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("function", [int4_matmul_panel, int4_matmul_dx_panel])
def test_every_code_is_decoded_exactly_once(monkeypatch, make_weight, normal, any_panel_size, function):
    seen = torch.zeros(23, 4, dtype=torch.int64)
    decode = panel.PanelDecoder.__call__

    def count(self, start, stop, first, last):
        seen[start:stop, first:last] += 1
        return decode(self, start, stop, first, last)

    monkeypatch.setattr(panel.PanelDecoder, "__call__", count)
    function(normal(2, 200 if function is int4_matmul_panel else 23), make_weight(23, 200))
    assert (seen == 1).all()


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(("panel_rows", "scheme", "dtype"), pairs([1, 8], SCHEMES, ALL_DTYPES), ids=str)
def test_no_tensor_is_as_large_as_the_weight(set_panel_size, make_weight, normal, device, scheme, dtype, panel_rows):
    m, n, k, r = 4, 600, 640, 8
    set_panel_size(panel_rows * k)
    weight = make_weight(n, k, 32, scheme)
    x, dy, t, b, a = (normal(*shape, dtype=dtype) for shape in ((m, k), (m, n), (m, r), (n, r), (r, k)))
    largest_operand = max(m * k, m * n, n * r, r * k)
    for function, operands in (
        (int4_matmul_panel, (x, weight, None, t, b)),
        (int4_matmul_dx_panel, (dy, weight, t, a)),
        (int4_embedding_panel, (torch.arange(5, device=device), weight, dtype)),
    ):
        with Allocations() as allocations:
            function(*operands)
        assert 0 < allocations.largest <= max(panel_rows * k, largest_operand), function.__name__


def test_a_large_lora_term_costs_the_sums_nothing(assert_accurate, make_weight, normal):
    for seed in range(20):
        weight = make_weight(23, 200, seed=seed)
        t, b, g, a = (100 * normal(*shape, seed=seed) for shape in ((9, 5), (23, 5), (9, 5), (5, 200)))
        check_matmul(assert_accurate, normal(9, 200, seed=seed), weight, None, t, b)
        check_dx(assert_accurate, normal(9, 23, seed=seed), weight, g, a)


@pytest.mark.parametrize(
    ("sizes", "dtype", "scheme", "panel_size"),
    pairs([(20, 33), (40, 16, 17)], ALL_DTYPES, SCHEMES, PANEL_SIZES),
    indirect=["panel_size"],
    ids=str,
)
def test_group_dx(assert_accurate, make_weight, normal, dtype, scheme, panel_size, sizes):
    """Weights that had one input are summed into one dX."""
    weights = [make_weight(n, 200, 32, scheme, seed=i) for i, n in enumerate(sizes)]
    dys = [normal(9, n, dtype=dtype, seed=i) for i, n in enumerate(sizes)]
    g, a = normal(9, 6, dtype=dtype, seed=3), normal(6, 200, dtype=dtype, seed=4)
    pairs = list(zip(dys, weights, strict=True))
    same = sum(reference.matmul_dx(dy, weight) for dy, weight in pairs) + g @ a
    truth = sum(reference.matmul_dx(dy.double(), weight) for dy, weight in pairs) + g.double() @ a.double()
    assert_accurate("dx", int4_matmul_dx_group_panel(dys, weights, g, a), same, truth)


def test_group_dx_of_weights_that_are_not_alike(make_weight, normal):
    """Only K must be the same. Each weight is decoded with its own groups, scheme and width."""
    weights = [make_weight(20, 200, 32, "affine"), make_weight(9, 200, 128), make_weight(1, 200, 64, "codebook")]
    weights += [make_weight(7, 200, 16, bits=8), make_weight(3, 200, 64, "affine", bits=8)]
    weights += [make_weight(5, 200, 32, "affine", torch.int8)]
    dys = [normal(4, weight.out_features, dtype=torch.float64, seed=i) for i, weight in enumerate(weights)]
    truth = sum(reference.matmul_dx(dy, weight) for dy, weight in zip(dys, weights, strict=True))
    torch.testing.assert_close(int4_matmul_dx_group_panel(dys, weights), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("plain_torch")
def test_buffers_made_in_inference_mode_can_be_used_outside(make_weight, normal):
    with use_workspace(Workspace()):
        with torch.inference_mode():
            int4_matmul_panel(normal(3, 70), make_weight(20, 70))
        assert int4_matmul_panel(normal(3, 70).requires_grad_(), make_weight(20, 70)).requires_grad


@pytest.mark.usefixtures("triton_kernels")
class TestDecodedByAKernel:
    """The panel route of a GPU, where Triton decodes and torch multiplies."""

    @pytest.mark.parametrize(
        ("dtype", "form", "scale_dtype", "panel_size"),
        pairs(ALL_DTYPES[:2], FORMS, SCALES[::2], PANEL_SIZES),
        indirect=["panel_size"],
        ids=str,
    )
    def test_both_directions(self, assert_accurate, make_weight, normal, dtype, form, scale_dtype, panel_size):
        m, n, k, r = 5, 23, 330, 3
        weight = make_weight(n, k, form.group_size, form.scheme, scale_dtype, bits=form.bits)
        shapes = [(m, k), (n,), (m, r), (n, r), (m, n), (m, r), (r, k)]
        x, bias, t, b, dy, g, a = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
        y, dx = int4_matmul_panel(x, weight, bias, t, b, True), int4_matmul_dx_panel(dy, weight, g, a, True)
        wide = [operand.double() for operand in (x, bias, t, b, dy, g, a)]
        truth = reference.matmul(wide[0], weight, *wide[1:4])
        assert_accurate("y", y, reference.matmul(x, weight, bias, t, b), truth)
        truth = reference.matmul_dx(wide[4], weight, *wide[5:])
        assert_accurate("dx", dx, reference.matmul_dx(dy, weight, g, a), truth)

    @pytest.mark.parametrize(
        ("k", "dtype", "form", "scale_dtype"),
        pairs([64, 65, 300], ALL_DTYPES[:2], FORMS, SCALES),
        ids=str,
    )
    def test_decoded_weights_are_right_to_the_bit(self, make_weight, dtype, device, form, scale_dtype, k):
        weight = make_weight(70, k, form.group_size, form.scheme, scale_dtype, bits=form.bits)
        decoder = panel.PanelDecoder(weight, dtype, 70, weight.chunks, by_kernel=True)
        whole = reference.decode(weight, dtype)
        assert torch.equal(decoder(0, 70, 0, weight.chunks), whole)
        if k == 300:
            assert torch.equal(decoder(7, 40, 4, 5), whole[7:40, 256:300])

    def test_group_dx(self, make_weight, normal):
        weights = [make_weight(n, 200, 128, seed=n) for n in (20, 33)]
        dys = [normal(9, 20), normal(9, 33)]
        truth = sum(reference.matmul_dx(dy.double(), weight) for dy, weight in zip(dys, weights, strict=True))
        dx = int4_matmul_dx_group_panel(dys, weights, by_kernel=True)
        torch.testing.assert_close(dx.double(), truth, rtol=1e-4, atol=1e-4)


def test_panels_are_whole_tiles():
    assert [whole_tiles(rows) for rows in (0, 1, 127, 128, 762, 5461)] == [1, 1, 127, 128, 640, 5376]


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(("rows", "width"), [(1000, 64), (300, 3000)])
def test_the_products_of_a_panel_begin_at_a_tile(monkeypatch, set_panel_size, make_weight, normal, rows, width):
    """Of 762 rows that fit, 640 are taken; those of the result's columns that a panel of dX gives, likewise."""
    weight = make_weight(rows, width)
    set_panel_size(762 * 64 if width == 64 else 300 * 762)
    seen = []
    decode = PanelDecoder.__call__
    monkeypatch.setattr(PanelDecoder, "__call__", lambda self, *span: seen.append(span) or decode(self, *span))
    x, dy = normal(5, width), normal(5, rows)
    exact = reference.decode(weight, torch.float64)
    torch.testing.assert_close(int4_matmul_panel(x, weight).double(), x.double() @ exact.t(), rtol=1e-4, atol=1e-3)
    assert all(start % TILE_ROWS == 0 for start, *_ in seen) or width != 64
    seen.clear()
    torch.testing.assert_close(int4_matmul_dx_panel(dy, weight).double(), dy.double() @ exact, rtol=1e-4, atol=1e-3)
    assert all(first * 64 % TILE_ROWS == 0 for *_, first, _ in seen) and len(seen) > 0
