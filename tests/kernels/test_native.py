"""Compiled code: decoding bit for bit, products against float64 on the decoded codes, for each instruction set."""

import subprocess
import sys

import pytest
import torch
from allocations import Allocations
from pairs import pairs

from mebp_triton.kernels import native, reference
from mebp_triton.kernels.cross_entropy import VOCABULARY_TILE, int4_cross_entropy_panel
from mebp_triton.kernels.functions import int4_matmul_group
from mebp_triton.kernels.layout import unpack
from mebp_triton.kernels.names import FORMS
from mebp_triton.kernels.native import native_decode, native_matmul, native_matmul_dx
from mebp_triton.kernels.native_rows import rms_norm
from mebp_triton.kernels.workspace import Workspace, use_workspace

COMPILED = native.available()[1:]
SCALES = (torch.float16, torch.float32, torch.int8)
# Around the sizes of tiles, blocks and vectors: few tokens, one block of them and more, rows and columns left over.
SIZES = (
    (1, 23, 600),
    (2, 50, 64),
    (3, 97, 129),
    (4, 33, 31),
    (8, 100, 576),
    (9, 65, 63),
    (33, 130, 449),
    (300, 49, 320),
)


@pytest.fixture(params=COMPILED)
def compiled(request):
    with native.using(request.param):
        yield request.param


def test_a_compiler_was_here():
    """The tests of this file would be empty without: whoever runs them has a compiler, as Triton needs one."""
    assert COMPILED and native.instructions() == COMPILED[-1]


@pytest.mark.parametrize(("form", "scale_dtype"), pairs(FORMS, SCALES), ids=str)
def test_decoding_is_bit_equal_to_plain_torch(compiled, make_weight, form, scale_dtype):
    for n, k in ((23, 600), (50, 64), (1, 1), (97, 129), (49, 31)):
        weight = make_weight(n, k, form.group_size, form.scheme, scale_dtype, bits=form.bits)
        wanted = reference.decode(weight, torch.float32)
        for dtype in native.DTYPES:
            assert torch.equal(native_decode(weight, torch.empty(n, k, dtype=dtype)), wanted.to(dtype))
    part = weight.rows(7, 30)
    assert torch.equal(native_decode(part, torch.empty(part.shape)), wanted[7:30])


@pytest.mark.parametrize(("form", "scale_dtype", "size"), pairs(FORMS, SCALES, SIZES), ids=str)
def test_products(compiled, assert_accurate, make_weight, normal, form, scale_dtype, size):
    m, n, k = size
    weight = make_weight(n, k, form.group_size, form.scheme, scale_dtype, bits=form.bits)
    x, bias, t, b = normal(m, k), normal(n, seed=1), normal(m, 5, seed=2), normal(n, 5, seed=3)
    dy, g, a = normal(m, n, seed=4), normal(m, 5, seed=5), normal(5, k, seed=6)
    for parts in ((None, None, None), (bias, t, b), (bias, None, None)):
        wide = [None if part is None else part.double() for part in parts]
        truth = reference.matmul(x.double(), weight, *wide)
        assert_accurate("y", native_matmul(x, [(weight, *parts)])[0], reference.matmul(x, weight, *parts), truth)
    for parts in ((None, None), (g, a)):
        wide = [None if part is None else part.double() for part in parts]
        truth = reference.matmul_dx(dy.double(), weight, *wide)
        assert_accurate("dx", native_matmul_dx([dy], [weight], *parts), reference.matmul_dx(dy, weight, *parts), truth)


@pytest.mark.parametrize("m", [1, 3, 4, 5, 8, 9, 12, 13, 31, 32, 255, 256, 257, 513])
def test_token_counts(compiled, assert_accurate, make_weight, normal, m):
    weight = make_weight(61, 200)
    x, dy = normal(m, 200), normal(m, 61)
    truth = reference.matmul(x.double(), weight)
    assert_accurate("y", native_matmul(x, [(weight, None, None, None)])[0], reference.matmul(x, weight), truth)
    truth = reference.matmul_dx(dy.double(), weight)
    assert_accurate("dx", native_matmul_dx([dy], [weight]), reference.matmul_dx(dy, weight), truth)


def test_long_sums(compiled, assert_accurate, make_weight, normal):
    for m in (2, 40):
        weight, x = make_weight(24, 16384), normal(m, 16384)
        truth = reference.matmul(x.double(), weight)
        assert_accurate("y", native_matmul(x, [(weight, None, None, None)])[0], reference.matmul(x, weight), truth)
        weight, dy = make_weight(16384, 24), normal(m, 16384)
        truth = reference.matmul_dx(dy.double(), weight)
        assert_accurate("dx", native_matmul_dx([dy], [weight]), reference.matmul_dx(dy, weight), truth)


@pytest.mark.parametrize("m", [3, 70])
def test_several_weights_at_once_give_what_each_gives_alone(compiled, make_weight, normal, m):
    """Their forms differ, and so do the ranks of their adapters."""
    weights = [make_weight(61, 200), make_weight(33, 200, 32, "affine", bits=8), make_weight(8, 200, 128, "codebook")]
    x, dys = normal(m, 200), [normal(m, weight.out_features, seed=i) for i, weight in enumerate(weights)]
    low = [(None, None), (normal(m, 3, seed=7), normal(33, 3, seed=8)), (normal(m, 17, seed=9), normal(8, 17, seed=10))]
    members = [(weight, None, *parts) for weight, parts in zip(weights, low, strict=True)]
    for together, member in zip(native_matmul(x, members), members, strict=True):
        assert torch.equal(together, native_matmul(x, [member])[0])
    alone = native_matmul_dx(dys[:1], weights[:1])
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        native_matmul_dx([dy], [weight], into=alone)
    assert torch.equal(native_matmul_dx(dys, weights), alone)


@pytest.mark.parametrize("m", [1, 8, 40, 300])
def test_results_do_not_depend_on_the_number_of_threads(compiled, make_weight, normal, m):
    weight = make_weight(500, 320)
    x, dy, threads = normal(m, 320), normal(m, 500), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            decoded = native_decode(weight, torch.empty(weight.shape))
            found.append((native_matmul(x, [(weight, None, None, None)])[0], native_matmul_dx([dy], [weight]), decoded))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_operands_of_any_strides(compiled, make_weight, normal):
    weight = make_weight(61, 200)
    x, t, b, bias = normal(200, 9).t(), normal(9, 10)[:, ::2], normal(5, 61).t(), normal(1).expand(61)
    assert torch.equal(
        native_matmul(x, [(weight, bias, t, b)])[0],
        native_matmul(x.contiguous(), [(weight, bias.contiguous(), t.contiguous(), b.contiguous())])[0],
    )
    dy, g, a = normal(1, 61).expand(9, 61), normal(5, 9).t(), normal(5, 400)[:, ::2]
    wanted = native_matmul_dx([dy.contiguous()], [weight], g.contiguous(), a.contiguous())
    assert torch.equal(native_matmul_dx([dy], [weight], g, a), wanted)
    part = weight.rows(10, 50).columns(64, 192)
    y = native_matmul(x[:, 64:192], [(part, None, None, None)])[0]
    dx = native_matmul_dx([dy[:, 10:50]], [part])
    assert torch.equal(y, native_matmul(x[:, 64:192], [(part.to("cpu", copy=True), None, None, None)])[0])
    assert torch.equal(dx, native_matmul_dx([dy[:, 10:50]], [weight.rows(10, 50)])[:, 64:192])


def test_views_that_turn_the_sign(compiled, make_weight, normal):
    weight, x = make_weight(61, 200), normal(9, 200)
    turned = native_matmul(torch._neg_view(x), [(weight, None, None, None)])[0]
    assert torch.equal(turned, native_matmul(-x, [(weight, None, None, None)])[0])
    assert torch.equal(rms_norm(torch._neg_view(x), torch.ones(200), 1e-6), rms_norm(-x, torch.ones(200), 1e-6))


@pytest.mark.parametrize("m", [3, 40])
def test_padding_and_neighbours_are_not_read(compiled, make_weight, normal, m):
    """Groups that only pad K hold NaN, and so does what lies behind the operands in memory."""
    weight = make_weight(20, 96, 32, "affine", torch.float32)
    for tensor in (weight.scales, weight.minimum):
        tensor[3:] = float("nan")
    x, dy = torch.full((m, 300), float("nan")), torch.full((m, 300), float("nan"))
    x[:, :96], dy[:, :20] = normal(m, 96), normal(m, 20)
    assert native_matmul(x[:, :96], [(weight, None, None, None)])[0].isfinite().all()
    assert native_matmul_dx([dy[:, :20]], [weight]).isfinite().all()


def test_empty_operands(compiled, make_weight):
    weight = make_weight(20, 96)
    assert native_matmul(torch.empty(0, 96), [(weight, None, None, None)])[0].shape == (0, 20)
    assert native_matmul_dx([torch.empty(0, 20)], [weight]).shape == (0, 96)
    assert not native_matmul_dx([torch.empty(3, 0)], [weight.rows(0, 0)], into=torch.zeros(3, 96)).any()


def test_scratch_memory_is_small_and_kept(compiled, make_weight, normal):
    """It holds X of one block of tokens, and for each thread decoded parts of a fixed size."""
    memory = Workspace()
    with use_workspace(memory):
        native_matmul(normal(256, 600), [(make_weight(2000, 600), None, None, None)])
        first = memory.buffers["native", torch.float32]
        assert first.numel() <= 256 * 600 + torch.get_num_threads() * 48 * (256 + 128 + 2 * 38) + 16
        native_matmul_dx([normal(1000, 2000)], [make_weight(2000, 600)])
        assert memory.buffers["native", torch.float32] is first


def test_scratch_memory_has_room_for_all_groups_of_a_run():
    """A run of 32 columns is decoded whole, even if K has fewer: two groups of 16, each with scales and minima."""
    tokens, rows = 32, 48
    for columns in (1, 16, 17, 32):
        size = native._scratch_size(native.MULTIPLY, 9, columns, 0, 1)
        assert size >= tokens * columns + rows * (tokens + 128) + 2 * 2 * rows


@pytest.mark.parametrize("multiplies", [False, True])
def test_the_processor_alone_decides_who_multiplies_many_tokens_of_16_bits(compiled, monkeypatch, multiplies):
    class Library:
        @staticmethod
        def mebp_multiplies_bfloat16():
            return multiplies

    monkeypatch.setattr(native, "_library", Library)
    monkeypatch.setattr(native, "_is_torch_faster_in", native._is_torch_faster_in.__wrapped__)
    assert native.takes(torch.empty(33, 64, dtype=torch.bfloat16)) is not multiplies
    assert native.takes(torch.empty(32, 64, dtype=torch.bfloat16))
    assert native.takes(torch.empty(33, 64, dtype=torch.float16)) and native.takes(torch.empty(33, 64))


def test_the_loss_makes_no_logits_and_no_decoded_head(compiled, make_weight, normal):
    tokens, vocabulary, width = 64, 8000, 64
    weight, targets = make_weight(vocabulary, width), torch.arange(tokens)
    with Allocations() as allocations:
        int4_cross_entropy_panel(normal(tokens, width), weight, targets)
    assert 0 < allocations.largest <= tokens * VOCABULARY_TILE < tokens * vocabulary // 7


def test_layers_that_share_an_input_take_one_region(compiled, make_weight, normal, monkeypatch):
    weights, x = [make_weight(61, 200), make_weight(33, 200)], normal(4, 200)
    t, b, bias = normal(4, 6), normal(94, 3), normal(94)
    jobs = []
    run = native._run
    monkeypatch.setattr(native, "_run", lambda kind, *rest: jobs.append(kind) or run(kind, *rest))
    outputs = int4_matmul_group(x, weights, bias, t, b)
    assert jobs == [native.MULTIPLY] and [y.shape for y in outputs] == [(4, 61), (4, 33)]


def test_an_instruction_set_can_be_chosen(make_weight):
    before = native.instructions()
    with native.using("off"):
        assert native.instructions() is None and not native.takes(torch.ones(1, 64))
        assert not native.decodes(make_weight(2, 64), torch.float32)
    assert native.instructions() == before
    with pytest.raises(ValueError, match="instruction set 'mmx' is not available here, only off"), native.using("mmx"):
        pass


def test_it_says_why_there_is_no_code(monkeypatch):
    assert native.described() == native.instructions()
    with native.using("off"):
        assert native.described() == "off, as MEBP_TRITON_NATIVE says"
    monkeypatch.setattr(native._choice(), "best", 0)
    assert native.described() == "none: this processor has neither AVX2 with FMA nor NEON"
    monkeypatch.setattr(native, "_library", lambda: None)
    assert native.described() == "none: the package was installed where no C compiler with OpenMP was found"


@pytest.mark.parametrize(("value", "wanted"), [("off", "None"), ("avx2", "avx2"), ("sse", "ValueError")])
def test_the_environment_chooses(value, wanted):
    if value not in ("off", "sse") and value not in COMPILED:
        pytest.skip(f"this processor has no {value}")
    code = "from mebp_triton.kernels import native\ntry: print(native.instructions())\nexcept ValueError as e: print(e)"
    environment = {"MEBP_TRITON_NATIVE": value, "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if wanted == "ValueError":
        wanted = "MEBP_TRITON_NATIVE must be one of off, neon, avx2, avx512, got 'sse'"
    assert done.stdout.strip() == wanted


def test_the_environment_names_only_what_is_here(monkeypatch):
    """A lesser instruction set, or plain torch, must not take the place of one that was asked for."""
    missing = next(name for name in ("neon", "avx2") if name not in native.available())
    monkeypatch.setenv("MEBP_TRITON_NATIVE", missing)
    with pytest.raises(ValueError, match=f"MEBP_TRITON_NATIVE={missing} is not available here, only off.*unset it"):
        native._Choice()


def test_codes_that_plain_torch_packs_are_those_that_are_decoded(compiled, make_weight):
    """Against the layout's own ``unpack``, so that a mistake common to both decoders would show."""
    weight = make_weight(5, 130, 64, "symmetric", torch.float32)
    codes = unpack(weight.packed, 130).float() - 8
    scales = weight.scales.t().repeat_interleave(64, 1)[:, :130]
    assert torch.equal(native_decode(weight, torch.empty(5, 130)), codes * scales)
