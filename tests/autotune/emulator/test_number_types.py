"""Types: their bits, and numbers read and written."""

import numpy as np
import pytest

from mebp_triton.autotune.emulator.faults import NotModelled
from mebp_triton.autotune.emulator.number_types import is_float, reader, type_bits, writer


def test_bits():
    assert [type_bits(name) for name in ("pred", "u8", "b16", "bf16", "f16x2", "s32", "f32x2", "b64")] == [
        *(1, 8, 16, 16),
        *(32, 32, 64, 64),
    ]
    assert is_float("bf16x2") and is_float("f32") and not is_float("b32")


@pytest.mark.parametrize("name", ["e4m3", "v2", "tf32", "x2", "", "b3"])
def test_other_types_are_refused(name):
    with pytest.raises(NotModelled, match="not modelled"):
        type_bits(name)


def test_numbers_in_double_precision_are_refused():
    with pytest.raises(NotModelled, match="f64"):
        reader("f64")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "f16x2", "bf16x2", "f32x2", "s32", "u16"])
def test_what_is_read_is_written_as_it_was(kind):
    numbers = np.float32([[1.5, -2.25], [0.0, 96.0]])
    if not is_float(kind):
        numbers = numbers.astype({"s32": np.int32, "u16": np.uint16}[kind])
    elif not kind.endswith("x2"):
        numbers = numbers[:, 0]
    bits = writer(kind)(numbers)
    assert 8 * bits.dtype.itemsize == type_bits(kind) and bits.dtype.kind == "u"
    assert np.array_equal(reader(kind)(bits), numbers)
