"""The inline assembly for codes of 8 bits, run instruction by instruction on every byte."""

import numpy as np
import ptx
import pytest
import torch

from mebp_triton.kernels import decode_bytes

CODES = torch.arange(256).double()


def words() -> np.ndarray:
    """Every byte in every place of a word: byte ``i`` of word ``w`` is ``w + 37 * i`` modulo 256."""
    w = np.arange(256, dtype=np.uint32)
    return sum(((w + 37 * i) % 256) << (8 * i) for i in range(4)).astype(np.uint32)


def of_bytes(values: torch.Tensor, place: int) -> torch.Tensor:
    """The values that belong to byte ``place`` of each of ``words()``."""
    return values[(torch.arange(256) + 37 * place) % 256]


@pytest.mark.parametrize(
    ("assembly", "dtype"),
    [(decode_bytes.CENTRED_BF16, torch.bfloat16), (decode_bytes.CENTRED_FP16, torch.float16)],
    ids=["bfloat16", "float16"],
)
def test_codes_less_128_in_two_bytes_each(assembly, dtype):
    registers = ptx.run(assembly.value, {"$2": words()})
    for pair in range(2):
        halves = ptx._halves(registers[f"${pair}"], dtype).unbind(-1)
        for half, found in enumerate(halves):
            assert torch.equal(found, of_bytes(CODES - 128, 2 * pair + half))


@pytest.mark.parametrize(
    ("assembly", "offset"),
    [(decode_bytes.CENTRED_FP32, 128.0), (decode_bytes.CODES_FP32, 0.0)],
    ids=["centred", "codes"],
)
def test_codes_in_float32(assembly, offset):
    registers = ptx.run(assembly.value, {"$4": words()})
    for place in range(4):
        found = torch.from_numpy(registers[f"${place}"].view(np.float32)).double()
        assert torch.equal(found, of_bytes(CODES - offset, place))


def test_codes_times_scales_are_rounded_once():
    """Every code with some scales, small ones and those whose products overflow among them."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        exponent = torch.randint(-24, 16, (4, 256), generator=generator)
        scales = torch.ldexp(torch.randn(4, 256, generator=generator), exponent).clamp(-65504, 65504).half()
        bits = scales.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        pairs = {"$3": bits[0] | bits[1] << 16, "$4": bits[2] | bits[3] << 16}
        registers = ptx.run(decode_bytes.SCALED_FP16.value, {"$2": words()} | pairs)
        for place in range(4):
            found = ptx._halves(registers[f"${place // 2}"], torch.float16)[:, place % 2]
            wanted = (of_bytes(CODES - 128, place) * scales[place].double()).half().double()
            assert torch.equal(found, wanted)


def test_a_wrong_selector_would_be_seen():
    broken = decode_bytes.CENTRED_BF16.value.replace("0x4342", "0x4341", 1)
    registers = ptx.run(broken, {"$2": words()})
    assert not torch.equal(ptx._halves(registers["$1"], torch.bfloat16)[:, 0], of_bytes(CODES - 128, 2))
