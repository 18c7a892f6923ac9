"""Arithmetic against exact fractions, rounded once; comparisons with NaN; what is not modelled."""

from fractions import Fraction

import numpy as np
import pytest
from ptx_kernels import instruction

from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.emulator.floats import as_f32, bf16_to_f32, f16_to_f32, f32_to_bf16, packed, to_f16, to_f32
from mebp_triton.autotune.emulator.operations import operation_of

RNG = np.random.default_rng(2)
# Bits of the significand, and the least exponent of a normal number.
FORMATS = {
    "f16": (11, -14, to_f16, f16_to_f32),
    "bf16": (8, -126, f32_to_bf16, bf16_to_f32),
    "f32": (24, -126, to_f32, as_f32),
}


def op(name):
    return operation_of(instruction(name)).function


def floats(count, shape=(1,)):
    return (RNG.standard_normal((*shape, count)) * 2.0 ** RNG.integers(-12, 12, (*shape, count))).astype(np.float32)


def rounded(value, digits, least):
    """To nearest even, with so many binary digits."""
    if value == 0:
        return 0.0
    size, exponent = abs(value), 0
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while size < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least) - digits + 1)
    return float(round(value / unit) * unit)


def operands(kind, count):
    """Three operands; half of the third nearly cancel the product of the others."""
    digits, least, to, back = FORMATS[kind]
    a, b, c = (to(floats(count)) for _ in range(3))
    c[:, ::2] = to(-(back(a) * back(b))[:, ::2] * np.float32(1.01))
    return a, b, c


@pytest.mark.parametrize("kind", FORMATS)
def test_fused_multiply_add(kind):
    digits, least, _, back = FORMATS[kind]
    a, b, c = operands(kind, 600)
    found = back(op(f"fma.rn.{kind}")(a, b, c))
    for x, y, z, got in zip(*(back(value).flat for value in (a, b, c)), found.flat, strict=True):
        if np.isfinite([x, y, z, got]).all():
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            assert float(got) == rounded(exact, digits, least), (x, y, z)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_sums_and_products(kind, name):
    digits, least, _, back = FORMATS[kind]
    a, b, _ = operands(kind, 300)
    b[:, ::3] = a[:, ::3] ^ np.array(1, dtype=a.dtype)
    found = back(op(f"{name}.rn.{kind}")(a, b))
    for x, y, got in zip(*(back(value).flat for value in (a, b)), found.flat, strict=True):
        x, y = Fraction(float(x)), Fraction(float(y))
        exact = {"add": x + y, "sub": x - y, "mul": x * y}[name]
        if np.isfinite(got):
            assert float(got) == rounded(exact, digits, least), (x, y)


@pytest.mark.parametrize(("kind", "one"), [("f16x2", "f16"), ("bf16x2", "bf16")])
def test_pairs_are_computed_as_their_halves(kind, one):
    values = [FORMATS[one][2](floats(200, (1, 2))).reshape(1, 200, 2) for _ in range(3)]
    found = op(f"fma.rn.{kind}")(*(packed(value) for value in values))
    alone = op(f"fma.rn.{one}")(*values)
    assert (found == packed(alone)).all()


def test_pairs_of_float32():
    values = [floats(50, (1, 2)).reshape(1, 50, 2) for _ in range(2)]
    words = [np.ascontiguousarray(value).view(np.uint64)[..., 0] for value in values]
    found = op("add.rn.f32x2")(*words)
    assert found.dtype == np.uint64 and found.shape == (1, 50)
    assert np.array_equal(found[..., None].view(np.float32), values[0] + values[1])


def test_a_16_bit_operand_and_a_float32_one():
    short, c = f32_to_bf16(floats(50)), floats(50)
    found = op("sub.rn.f32.bf16")(short, to_f32(c))
    assert np.array_equal(as_f32(found), bf16_to_f32(short) - c)
    assert operation_of(instruction("fma.rn.f32.f16")).bits == (16, 16, 32)


def test_comparisons_with_nan():
    a, b = to_f32(np.float32([[1, np.nan, 2, np.nan]])), to_f32(np.float32([[1, 1, np.nan, np.nan]]))
    wanted = {"eq": [1, 0, 0, 0], "ne": [0, 0, 0, 0], "equ": [1, 1, 1, 1], "neu": [0, 1, 1, 1]}
    wanted |= {"le": [1, 0, 0, 0], "ltu": [0, 1, 1, 1], "nan": [0, 1, 1, 1], "num": [1, 0, 0, 0]}
    for name, expected in wanted.items():
        assert op(f"setp.{name}.f32")(a, b).tolist() == [[bool(value) for value in expected]], name


def test_comparisons_of_integers_follow_the_sign():
    a, b = np.uint32([[0xFFFFFFFF]]), np.uint32([[1]])
    assert op("setp.lt.s32")(a, b).all() and not op("setp.lo.u32")(a, b).any() and op("setp.gt.u32")(a, b).all()
    both = op("setp.lt.and.s32")(a, b, np.array([[False]]))
    assert not both.any() and op("setp.lt.or.s32")(a, b, np.array([[False]])).all()


def test_a_comparison_of_pairs_gives_two_results():
    a, b = (packed(f32_to_bf16(np.float32(value)).reshape(1, 1, 2)) for value in ([1.0, 5.0], [2.0, 4.0]))
    low, high = op("setp.le.bf16x2")(a, b)
    assert low.tolist() == [[True]] and high.tolist() == [[False]]


def test_extremes_and_nan():
    a, b = to_f32(np.float32([[np.nan, 3]])), to_f32(np.float32([[1, 2]]))
    assert as_f32(op("max.f32")(a, b)).tolist() == [[1, 3]]
    assert np.isnan(as_f32(op("max.NaN.f32")(a, b))[0, 0])
    assert op("min.s32")(np.uint32([[0xFFFFFFFF]]), np.uint32([[1]])) == 0xFFFFFFFF


def test_subnormal_numbers_with_ftz():
    tiny = to_f32(np.float32([[1e-39]]))
    assert op("add.f32")(tiny, tiny).any() and not op("add.ftz.f32")(tiny, tiny).any()


def test_conversions():
    values = np.float32([[2.5, -2.5, 3e9, -3e9, np.nan, 1.0]])
    bits = to_f32(values)
    assert op("cvt.rzi.s32.f32")(bits).view(np.int32).tolist() == [[2, -2, 2**31 - 1, -(2**31), 0, 1]]
    assert op("cvt.rni.s32.f32")(bits).view(np.int32)[0, :2].tolist() == [2, -2]
    assert op("cvt.u32.u16")(np.uint16([[65535]])) == 65535 and op("cvt.s32.s16")(np.uint16([[65535]])) == 0xFFFFFFFF
    assert op("cvt.u16.u32")(np.uint32([[0x12345]])) == 0x2345
    assert as_f32(op("cvt.rn.f32.s32")(np.uint32([[0xFFFFFFFF]]))) == -1
    # The first operand becomes the upper half.
    assert op("cvt.rn.bf16x2.f32")(to_f32(np.float32([[1]])), to_f32(np.float32([[2]]))) == 0x3F804000


def test_products_of_integers():
    a, b = np.uint32([[0xFFFFFFFE]]), np.uint32([[3]])
    assert op("mul.wide.s32")(a, b).view(np.int64) == -6 and op("mul.wide.u32")(a, b) == 0xFFFFFFFE * 3
    assert op("mul.hi.u32")(a, b) == 2 and op("mul.lo.s32")(a, b).view(np.int32) == -6
    assert op("mad.wide.u32")(a, b, np.uint64([[1]])) == 0xFFFFFFFE * 3 + 1
    assert op("rem.s32")(a, b).view(np.int32) == -2


@pytest.mark.parametrize(
    "name",
    [
        "add.rz.f32",
        "add.sat.f32",
        "add.f64",
        "fma.rm.f32",
        "cvt.rz.f16.f32",
        "cvt.rn.satfinite.e4m3x2.f32",
        "mul.sat.f32",
    ]
    + ["mul.hi.s64", "prmt.b32.f4e", "mul24.lo.s32", "popc.b32", "atom.global.add.f32", "sin.approx.f32", "add.cc.u32"]
    + ["setp.lt.ftz.f16", "setp.lt.and.bf16x2", "tcgen05.mma.cta_group::1.kind::f16", "elect.sync", "shf.l.b32"],
)
def test_what_is_not_modelled_is_named(name):
    with pytest.raises(NotModelled, match=r"not modelled|is modelled"):
        operation_of(instruction(name))


def test_the_reciprocal_of_a_root():
    found = as_f32(op("rsqrt.approx.ftz.f32")(to_f32(np.float32([[4.0, 0.25, 0.0, -1.0]]))))
    assert found[0, :3].tolist() == [0.5, 2.0, np.inf] and np.isnan(found[0, 3])
