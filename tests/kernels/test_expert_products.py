"""The products of experts in one launch against float64 on the decoded codes, and against a launch for each expert."""

from dataclasses import replace

import pytest
import torch
from interpreted import DTYPES
from pairs import pairs

from mebp_triton.autotune.cases import LAYOUTS, Case, Operands
from mebp_triton.autotune.correctness import check, prepare
from mebp_triton.autotune.expert_cases import EXPERT_OPERATIONS, in_one_storage
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.expert_products import int4_expert_products_dx_triton, int4_expert_products_triton
from mebp_triton.kernels.expert_table import Experts
from mebp_triton.kernels.matmul import int4_matmul_triton
from mebp_triton.kernels.matmul_dx import int4_matmul_dx_triton
from mebp_triton.kernels.names import FORMS

pytestmark = pytest.mark.usefixtures("triton_kernels")

KERNELS = tuple(EXPERT_OPERATIONS)
SCALE_DTYPES = (torch.float16, torch.float32, torch.int8)
# Tokens of each expert: none, one, a whole tile, more than a tile; the last expert has none, or all.
ROWS = ((0, 1, 16, 18, 0), (20,), (0, 0, 7), (1, 1, 2))


def right(case, device):
    verdict = check(case, device)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(
    ("kernel", "dtype", "form", "scale_dtype", "rows"), pairs(KERNELS, DTYPES, FORMS, SCALE_DTYPES, ROWS), ids=str
)
def test_every_form(device, kernel, dtype, form, scale_dtype, rows):
    case = Case(kernel, None, 20, rows, 70, dtype=dtype, scale_dtype=scale_dtype, rank=3, **form._asdict())
    right(case, device)


@pytest.mark.parametrize(
    ("kernel", "n", "k", "layout", "rank"),
    pairs(KERNELS, (1, 17, 64), (1, 65, 128), LAYOUTS, (0, 1, 33)),
    ids=str,
)
def test_sizes_ranks_and_strides(device, kernel, n, k, layout, rank):
    right(Case(kernel, None, n, (3, 0, 18), k, dtype=torch.float32, layout=layout, rank=rank), device)


@pytest.mark.parametrize(
    ("kernel", "block_m", "block_n", "block_k", "other"), pairs(KERNELS, (16, 64), (16, 64), (64, 128), (False, True))
)
def test_every_tile(device, kernel, block_m, block_n, block_k, other):
    """Or with the other way of its product: scaled sums, or the weight on the right."""
    choice = {"scale_sums": other} if kernel == "expert_matmul" else {"weight_left": not other}
    config = TileConfig(block_m, block_n, block_k, **choice)
    right(Case(kernel, config, 45, (2, 20), 150, group_size=128, dtype=torch.float32, rank=4), device)


@pytest.mark.parametrize(("form", "dtype", "layout"), pairs(FORMS[::4], DTYPES, ("contiguous", "offset")), ids=str)
def test_the_bits_of_a_launch_for_each_expert(device, form, dtype, layout):
    """Whether or not tensors begin at whole words of 16 bytes."""
    config, alone = TileConfig(16, 16, 64), (int4_matmul_triton, int4_matmul_dx_triton)
    for kernel, one in zip(KERNELS, alone, strict=True):
        case = Case(kernel, config, 16, (5, 0, 17), 64, dtype=dtype, layout=layout, rank=3, **form._asdict())
        prepared = prepare(case, device)
        operation = prepared.operation
        assert Experts(operation.weights).aligned is (layout == "contiguous")
        (found,) = prepared.launch()
        parts = zip(
            found.split(case.sizes),
            operation.given.split(case.sizes),
            operation.weights,
            operation.low.split(case.sizes),
            operation.high,
            strict=True,
        )
        for part, given, weight, low, high in parts:
            bias = (None,) if kernel == "expert_matmul" else ()
            assert torch.equal(part, one(given, weight, *bias, low, high, config))


@pytest.mark.parametrize("launch", [int4_expert_products_triton, int4_expert_products_dx_triton])
def test_no_byte_outside_is_written(guarded, make_weight, normal, device, launch):
    experts = Experts(in_one_storage([make_weight(64, 64, seed=seed) for seed in range(3)]))
    y = guarded(launch, normal(20, 64), experts, [3, 0, 17])
    assert y.isfinite().all()
    assert guarded(launch, normal(0, 64), experts, [0, 0, 0]).shape == (0, 64)


def test_a_nan_stays_in_its_row(make_weight, normal):
    experts = Experts(in_one_storage([make_weight(20, 100, seed=seed) for seed in range(2)]))
    x = normal(9, 100)
    clean = int4_expert_products_triton(x, experts, [4, 5])
    x[3, 99] = float("nan")
    y = int4_expert_products_triton(x, experts, [4, 5])
    others = [row for row in range(9) if row != 3]
    assert y[3].isnan().all() and torch.equal(y[others], clean[others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [3, 1, 1]}, "rows must have a number for each of 2 weights, got 3"),
        ({"rows": [3, 1]}, r"x must have shape \(4, 64\), got \(5, 64\)"),
        ({"t": torch.zeros(5, 2)}, "t and b go together"),
        ({"t": torch.zeros(4, 2), "b": torch.zeros(2, 8, 2)}, r"t must have shape \(5, 2\), got \(4, 2\)"),
        ({"t": torch.zeros(5, 2), "b": torch.zeros(2, 8, 3)}, r"b must have shape \(2, 8, 2\), got \(2, 8, 3\)"),
        ({"config": TileConfig(16, 16, 64, split=2)}, "does not suit"),
    ],
)
def test_mistakes_are_named(make_weight, device, change, message):
    experts = Experts(in_one_storage([make_weight(8, 64), make_weight(8, 64)]))
    given = {"x": torch.zeros(5, 64), "rows": [3, 2], **change}
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        int4_expert_products_triton(experts=experts, **given)


def test_errors_in_a_table_are_noticed(device, monkeypatch):
    """Each column of it: the first row of a tile, the end of an expert's, the expert, and where its tensors lie."""
    case = Case("expert_matmul", TileConfig(16, 16, 64), 16, (5, 2), 64, "affine", 32, torch.float32, torch.int8, 4)
    columns = [0, 1, 2, 3, 4, 5, 7, 8]  # there is no codebook
    for codebook, column in [(False, column) for column in columns] + [(True, 6)]:
        prepared = prepare(replace(case, scheme="codebook") if codebook else case, device)
        with monkeypatch.context() as patch:
            patch.setattr(Experts, "table", with_error(Experts.table, column))
            (found,) = prepared.launch()
        assert not prepared.judge([found]).ok, column


def with_error(table, column):
    """The table whose last tile has, in one column, what the first tile has."""

    def wrong(*arguments):
        made = table(*arguments)
        made[-1, column] = made[0, column]
        return made

    return wrong


def test_operands_lie_in_one_storage(device):
    case = Case("expert_matmul", sizes=(2, 3), layout="offset", scheme="affine")
    weights = EXPERT_OPERATIONS[case.kernel](case, Operands(case, torch.device(device))).weights
    assert len({tensor.untyped_storage().data_ptr() for one in weights for tensor in one.tensors().values()}) == 1
