"""Cases as data, and the operands that they describe."""

from dataclasses import replace

import pytest
import torch

from mebp_triton.autotune.cases import LAYOUTS, Case, Operands, laid_out, tile_case
from mebp_triton.kernels.configs import TileConfig
from mebp_triton.kernels.reference import decode

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": "mamul"}, "kernel must be one of .*, got 'mamul'"),
        ({"kernel": "decode", "layout": "sparse"}, "layout must be one of .*, got 'sparse'"),
        ({"kernel": "matmul_dx", "sizes": (1, 2, 3, 4)}, "takes 1 to 3 weights, got 4"),
        (
            {"kernel": "matmul", "scheme": "affine", "config": TileConfig(16, 16, 64, scale_sums=True)},
            "must suit the problem",
        ),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Case(**fields)


def test_a_line_says_what_is_special():
    config = TileConfig(16, 32, 64, split=2, weight_left=False)
    case = Case("matmul_dx", config, m=5, sizes=(70, 34), rank=4, layout="offset", scale_dtype=torch.float32)
    expected = "matmul_dx bf16 M5 N70+34 K200 symmetric G64 r4 scales32 offset [16x32x64 w4 s2 split2 right]"
    assert str(case) == expected
    assert str(Case("decode", scale_dtype=torch.int8)) == "decode bf16 M17 N70 K200 symmetric G64 two-level"
    assert str(Case("split_sums", split=4)) == "split_sums bf16 M17 N70 K200 symmetric G64 split4"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_numbers_lie_in_memory_as_the_layout_says(layout):
    values = torch.arange(24.0).view(3, 8)
    found = laid_out(values, layout)
    assert torch.equal(found, values)
    assert found.stride() == {"transposed": (1, 3), "padded": (40, 1), "offset": (27, 1)}.get(layout, (8, 1))
    assert (found.storage_offset() % 4 == 0) is (layout != "offset")
    around = torch.tensor(()).set_(found.untyped_storage())
    assert around.isfinite().sum() == 24


def test_operands_are_the_same_for_the_same_case():
    case = Case("matmul", layout="expanded", k=70, group_size=32, scheme="affine")
    first, second = (Operands(case, CPU) for _ in range(2))
    x, weight = first.activations(3, 4), first.weight(9)
    assert torch.equal(second.activations(3, 4), x) and torch.equal(second.weight(9).packed, weight.packed)
    assert x.stride(0) == 0
    assert decode(weight).isfinite().all()
    # The fourth group holds columns 96 to 127, which do not exist.
    assert weight.scales[3].isnan().all() and weight.minimum[3].isnan().all()
    assert decode(Operands(replace(case, scale_dtype=torch.int8), CPU).weight(9)).isfinite().all()


@pytest.mark.parametrize("kernel", ["matmul", "matmul_dx"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("split", [1, 2, 4, 8, 16])
def test_a_part_of_a_tile_case_has_more_steps_than_the_pipeline_has_stages(kernel, aligned, split):
    """So every buffer of the pipeline is used again."""
    for stages in (2, 3, 4):
        config = TileConfig(16, 32, 64, num_stages=stages, split=split)
        for members in (1, 2, 3):
            case = tile_case(kernel, config, aligned, members)
            if kernel == "matmul":
                steps = -(-case.k // config.block_k)
            else:
                steps = sum(-(-size // config.block_n) for size in case.sizes)
            assert -(-steps // split) > stages
