"""The problems to tune: as typed, for groups of layers, and one for every bucket."""

import pytest
import torch

from mebp_triton.autotune.shapes import parse_shapes, parse_tokens, problems, with_groups
from mebp_triton.kernels.configs import TUNED
from mebp_triton.kernels.names import Form
from mebp_triton.kernels.tables import M_BUCKETS, bucket


def test_shapes_are_read():
    assert parse_shapes("4096x11008") == [(4096, 11008)]
    assert parse_shapes(" 8x16, 1X2") == [(8, 16), (1, 2)]


@pytest.mark.parametrize("text", ["", "4096", "4096x", "x4", "4x4;5x5", "4x4,", "0x4", "4x-4", "4x4x4", "1e3x4", "٤x4"])
def test_other_shapes_are_refused(text):
    with pytest.raises(ValueError, match=r"shapes must be pairs NxK .* as in 4096x4096"):
        parse_shapes(text)
    with pytest.raises(ValueError, match=r"shapes must be pairs"):
        parse_shapes("16777217x4")


def test_tokens_are_read():
    assert parse_tokens("1, 64,4096") == [1, 64, 4096]
    for text in ("", "0", "4097", "-1", "1,", "a", "1.5"):
        with pytest.raises(ValueError, match=r"m must be numbers of tokens 1\.\.4096"):
            parse_tokens(text)


def test_a_group_is_a_shape_besides_its_members():
    groups = [[(48, 32), (16, 32), (16, 32)], [(32, 48)], [(80, 32), (80, 32)]]
    assert with_groups(groups) == [(48, 32), (16, 32), (80, 32), (32, 48), (160, 32)]
    assert with_groups([]) == []


def test_one_real_problem_for_every_bucket():
    # 4096 and 4864 lie in one bucket. The one with more weights stands for it, in whichever order they come.
    for shapes in ([(4096, 1024), (4864, 1024)], [(4864, 1024), (4096, 1024)]):
        found = problems(shapes, [16, 64], "affine", 32, torch.float16)
        assert {(p.kernel, p.m, p.n, p.k) for p in found} == {(k, m, 4864, 1024) for k in TUNED for m in (16, 64)}
        assert {(p.scheme, p.group_size, p.dtype) for p in found} == {("affine", 32, torch.float16)}
    assert {p.form for p in problems([(128, 128)], [3], "affine", 16, bits=8)} == {Form("affine", 16, 8)}
    assert [p.m for p in problems([(128, 128)], [3, 9]) if p.kernel == "matmul"] == [9]


def test_by_default_every_bucket_of_tokens():
    found = problems([(896, 896), (4864, 896), (896, 4864)])
    assert len({bucket(problem) for problem in found}) == len(found) == len(M_BUCKETS) * 3 * len(TUNED)
