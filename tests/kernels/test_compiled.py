"""The kernels as compiled for GPUs, executed: chosen problems, in which every two settings meet.

Shipped configurations are executed in ``test_shipped_tables.py``, and all of them with every kind of weight by
``bench/compiled.py``, which adds 1,000 random problems.
"""

import functools
import itertools

import pytest
import small_operations
import torch
from pairs import pairs
from token_gradients import SIZES as GRADIENT_SIZES
from token_gradients import verdicts

from mebp_triton.autotune.cases import LAYOUTS, STYLES, Case
from mebp_triton.autotune.compile import blank_weight, compile_for, resource_usage
from mebp_triton.autotune.correctness import check, prepare
from mebp_triton.autotune.emulator.driver import Emulator
from mebp_triton.autotune.emulator.state import no_blocks
from mebp_triton.autotune.expert_cases import blank_expert_launch
from mebp_triton.autotune.rank import unfit
from mebp_triton.kernels import gated_activation, reference, rms_norm, rope
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.expert_table import Experts
from mebp_triton.kernels.layout import SCALE_DTYPES
from mebp_triton.kernels.names import FORMS, GROUP_SIZES, SCHEMES, Form
from mebp_triton.kernels.routing import routes_of
from mebp_triton.kernels.tables import bucket

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# With different instructions each. On sm_90, tiles of 64 x 64 with four warps are multiplied by ``wgmma``. A device of
# sm_75 has no bfloat16: panels take the kernels' place there, and only the emulator executes that code.
TARGETS = (75, 80, 90, 120)
# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)
TILES = ((16, 64, 64, 4, 3), (64, 64, 64, 4, 2), (32, 32, 128, 8, 1), (16, 32, 64, 2, 4))
# (M, N of each of at most three members, K): as in a model's layers; nothing divides anything; smaller than a tile.
SIZES = ((80, (80, 48, 16), 320), (37, (67, 1, 34), 200), (1, (5, 130, 3), 97))
SCALES = (*SCALE_DTYPES, torch.int8)
KINDS = (SCHEMES, GROUP_SIZES, DTYPES, SCALES, LAYOUTS, TARGETS)
LAUNCHES = (SIZES, TILES, (1, 2, 3), (1, 2, 8), (0, 5, 16, 40), (False, True))


def product(kernel, kind, launch, **choice):
    """A target and a case, of one value of each factor of ``KINDS`` and of ``LAUNCHES``."""
    scheme, group_size, dtype, scale_dtype, layout, target = kind
    (m, sizes, k), tile, members, split, rank, bias = launch
    config = TileConfig(*tile, split=split, **choice)
    case = Case(
        kernel, config, m, sizes[:members], k, scheme, group_size, dtype, scale_dtype, rank, bias, layout=layout
    )
    return target, case


def products():
    """Forward products, dX in both orders, and forward products that scale sums instead of weights."""
    for row in pairs(*KINDS, *LAUNCHES):
        yield product("matmul", row[:6], row[6:])
    for *row, left in pairs(*KINDS, *LAUNCHES[:-1], (False, True)):
        yield product("matmul_dx", row[:6], (*row[6:], False), weight_left=left)
    # Scales are read elsewhere, and nothing else is different: fewer settings.
    tiles = ((32, TILES[0]), (64, TILES[1]), (128, (32, 32, 128, 8, 1)))
    for (group_size, tile), dtype, target, *launch in pairs(tiles, DTYPES, TARGETS, SIZES, *LAUNCHES[2:]):
        kind = ("symmetric", group_size, dtype, torch.float16, "padded", target)
        yield product("matmul", kind, (launch[0], tile, *launch[1:]), scale_sums=True)


def others():
    """Rows of a table by id, all rows, tiles of logits, and sums of parts."""
    for kernel, size, *kind, target in pairs(("embedding", "decode"), SIZES, *KINDS):
        m, sizes, k = size
        scheme, group_size, dtype, scale_dtype, layout = kind
        yield target, Case(kernel, None, m, sizes[1:2], k, scheme, group_size, dtype, scale_dtype, layout=layout)
    tiles = ((37,), (20, 1, 1030))
    for sizes, dtype, layout, target, slope in pairs(tiles, DTYPES, LAYOUTS[:2], TARGETS, (False, True)):
        yield target, Case("softmax_tile", None, 5, sizes, dtype=dtype, bias=slope, layout=layout)
    for sizes, dtype, target, split in pairs(((1025, 0, 3), (48,)), DTYPES, TARGETS, (2, 8)):
        yield target, Case("split_sums", None, sizes=sizes, dtype=dtype, split=split)


def of_8_bits():
    """What decodes these codes, and reads scales of a half run, in the dtypes that have assembly of their own."""
    forms = [form for form in FORMS if form.bits == 8 and form.group_size <= 64]
    for form, dtype, tile, size, kernel, target, scale_dtype in pairs(
        forms, DTYPES[:2], TILES[:3], SIZES[:2], ("matmul", "matmul_dx"), TARGETS[1:], SCALES[::2]
    ):
        m, sizes, k = size
        config = TileConfig(*tile, weight_left=kernel == "matmul" or tile[1] == 64)
        kind = {"dtype": dtype, "scale_dtype": scale_dtype, **form._asdict()}
        yield target, Case(kernel, config, m, sizes[:2], k, rank=5, **kind)
    for (group_size, block_k), dtype in pairs(((32, 64), (128, 128)), DTYPES):
        config = TileConfig(16, 64, block_k, scale_sums=True)
        yield 80, Case("matmul", config, 33, k=200, group_size=group_size, dtype=dtype, bits=8)
    for form, scale_dtype, kernel, dtype in pairs(forms, SCALES, ("embedding", "decode"), DTYPES):
        yield 80, Case(kernel, None, scale_dtype=scale_dtype, dtype=dtype, layout="padded", **form._asdict())


def over_experts():
    """Products of experts with no token, with one, and with more than a tile; sizes as those of ``SIZES``."""
    tokens = ((20, 0, 1, 70), (3,))
    for kernel, rows, (n, k), tile, target, form, dtype, scale_dtype, layout, rank in pairs(
        ("expert_matmul", "expert_matmul_dx"),
        tokens,
        ((80, 320), (67, 200)),
        TILES[:3],
        TARGETS[1:],
        [form for form in FORMS if form.group_size <= 64 and (form.bits == 4 or form.group_size == 16)],
        DTYPES[:2],
        (torch.float16, torch.int8),
        ("contiguous", "offset"),
        (0, 5),
    ):
        config = TileConfig(*tile, weight_left=kernel == "expert_matmul" or tile[0] == 16)
        kind = {"dtype": dtype, "scale_dtype": scale_dtype, "layout": layout, "rank": rank, **form._asdict()}
        yield target, Case(kernel, config, n, rows, k, **kind)


PRODUCTS, OTHERS = list(products()), [*others(), *of_8_bits(), *over_experts()]


def identity(value):
    return f"sm_{value}" if isinstance(value, int) else str(value)


@pytest.mark.parametrize(("target", "case"), [*PRODUCTS, *OTHERS], ids=identity)
def test_problems(target, case):
    with Emulator(target):
        verdict = check(case)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(
    ("target", "sizes", "dtype", "out_dtype"),
    pairs(TARGETS[1:3], GRADIENT_SIZES[:4], DTYPES, (torch.float32, torch.bfloat16)),
    ids=str,
)
def test_gradients_of_lora(target, sizes, dtype, out_dtype):
    with Emulator(target):
        found = list(verdicts(sizes, dtype, out_dtype))
    assert all(verdict["ok"] for verdict in found), found


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for _, case in (*PRODUCTS, *OTHERS)], ids=str)
def test_problems_on_this_gpu(case):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    verdict = check(case, "cuda")
    assert verdict.ok, verdict.reason


def test_every_two_settings_meet():
    """Read off the cases, so that a setting that does not reach them is missed."""
    for kernel, sums in (("matmul", False), ("matmul_dx", False), ("matmul", True)):
        rows = []
        for target, case in PRODUCTS:
            config = case.config
            if case.kernel == kernel and config.scale_sums is sums:
                tile = config.block_m, config.block_n, config.block_k, config.num_warps, config.num_stages
                row = [target, case.dtype, tile, case.m, len(case.sizes), case.rank, config.split]
                row.append(config.weight_left if kernel == "matmul_dx" else case.bias)
                rows.append(row if sums else [*row, case.scheme, case.group_size, case.scale_dtype, case.layout])
        for first, second in itertools.combinations(zip(*rows, strict=True), 2):
            assert len(set(zip(first, second, strict=True))) == len(set(first)) * len(set(second))
            assert len(set(first)) > 1 < len(set(second))


@pytest.mark.parametrize("case", [Case("matmul_dx", rank=8), Case("decode")], ids=str)
def test_targets_of_one_family_have_the_same_code(case):
    """So one of them is executed for all."""
    prepared, codes = prepare(case), set()
    for target in (86, 87, 89):
        with Emulator(target, blocks=no_blocks) as emulator:
            prepared.launch()
        codes.add(emulator.launches[0].compiled.code)
    assert len(codes) == 1


# --- small operations -----------------------------------------------------------------------------------------------


def small_operation(name, dtype, columns=200):
    """A fused operation, its twin, and arguments for ``small_operations.check``."""

    def normal(*shape, kind=dtype):
        return torch.randn(shape).to(kind)

    operation, _, kind = name.partition(" ")
    if operation == "rms_norm":
        functions = rms_norm.rms_norm, reference.rms_norm
        functions = [functools.partial(one, eps=1e-5, style=kind) for one in functions]
        return *functions, [normal(2, 5, 3, columns).transpose(1, 2)], [normal(columns)]
    if operation == "gated_activation":
        functions = gated_activation.gated_activation, reference.gated_activation
        functions = [functools.partial(one, kind=kind) for one in functions]
        return *functions, [2 * normal(3, 4 * columns)[:, :columns], normal(3, columns)], (), kind == "silu"
    angles = [normal(1, 5, 48, kind=torch.float32 if kind else dtype) for _ in "cs"]
    q, k = (normal(2, 5, heads, 64).transpose(1, 2) for heads in (7, 2))
    return rope.rope, reference.rope, [q, k], angles


SMALL_OPERATIONS = (
    *(f"rms_norm {style}" for style in ("twice", "once", "offset")),
    *(f"gated_activation {kind}" for kind in ("silu", "gelu_tanh", "gelu")),
    "rope",
    "rope float32",
)


@pytest.mark.parametrize("name", SMALL_OPERATIONS)
def test_small_operations(name):
    with Emulator(80):
        small_operations.check(*small_operation(name, torch.bfloat16))


def small_cases():
    """Every style, on other targets, in other dtypes and layouts; ``bench/compiled.py --part small`` mixes all."""
    kinds = [(kernel, style) for kernel, styles in STYLES.items() for style in styles]
    targets, dtypes = itertools.cycle((90, 120, 75)), itertools.cycle((torch.bfloat16, torch.float32, torch.float16))
    for (kernel, style), target, dtype, layout in zip(kinds, targets, dtypes, itertools.cycle(LAYOUTS[1:])):
        yield target, Case(kernel, None, 9, (37, 3), 70, dtype=dtype, split=2, layout=layout, style=style)


@pytest.mark.parametrize(("target", "case"), list(small_cases()), ids=identity)
def test_small_operations_in_other_layouts(target, case):
    with Emulator(target):
        verdict = check(case)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(
    ("kernel", "target", "m"), [("matmul", 80, 16), ("matmul", 90, 128), ("matmul_dx", 80, 64), ("matmul_dx", 90, 16)]
)
def test_products_of_experts_keep_to_their_registers(kernel, target, m):
    """And no load is waited for in the main loop, by the route that the tables give."""
    experts = Experts([blank_weight(768, 2048, Form("symmetric", 64, 4), torch.float16)] * 128)
    problem = bucket(experts.problem(kernel, 128 * m, torch.bfloat16))
    config = routes_of(f"sm_{target}").over_experts.choose(problem)
    assert isinstance(config, TileConfig) and config.block_m == m
    function, arguments = blank_expert_launch(kernel, experts, 128 * m, config)
    static = compile_for(function, arguments, target, config.launch_options())
    assert unfit(problem, static) is None


@pytest.mark.parametrize(
    ("name", "target"),
    [("rms_norm once", 75), ("gated_activation gelu", 87), ("rope", 90), ("gated_activation silu", 100)],
)
def test_small_operations_keep_to_their_registers(name, target):
    """A row of the most columns has the largest tile."""
    columns = rms_norm.MOST_COLUMNS if name.startswith("rms_norm") else 200
    function, _, inputs, fixed, *_ = small_operation(name, torch.bfloat16, columns)
    with Emulator(target, blocks=no_blocks) as emulator:
        small_operations.results(function, inputs, fixed)
    assert [resource_usage(launch.compiled.cubin)["STACK"] for launch in emulator.launches] == [0, 0]
