"""The inline assembly, run instruction by instruction, and the arithmetic that it rests on.

The other tests of the kernels run the plain twins. Here it is shown that both decode alike.
"""

import numpy as np
import ptx
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mebp_triton.kernels import decode, split

BYTES = torch.arange(256, dtype=torch.uint8)
LOW, HIGH = (BYTES & 15).double() - 8, (BYTES >> 4).double() - 8


def words() -> np.ndarray:
    """Every byte in every place of a word: ``[256]``, byte ``i`` of word ``w`` is ``w + 37 * i`` modulo 256."""
    w = np.arange(256, dtype=np.uint32)
    return sum(((w + 37 * i) % 256) << (8 * i) for i in range(4)).astype(np.uint32)


def of_bytes(values: Tensor, place: int) -> Tensor:
    """The values that belong to byte ``place`` of each of ``words()``."""
    return values[(torch.arange(256) + 37 * place) % 256]


def halves(register: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(ptx._halves(register, dtype).unbind(-1))


@pytest.mark.parametrize(
    ("assembly", "dtype"),
    [(decode.UNPACK_BF16, torch.bfloat16), (decode.UNPACK_FP16, torch.float16)],
    ids=["bfloat16", "float16"],
)
def test_codes_less_8_in_two_bytes_each(assembly, dtype):
    registers = ptx.run(assembly.value, {"$4": words()})
    for plane, wanted in enumerate((LOW, HIGH)):
        for pair in range(2):
            for half, found in enumerate(halves(registers[f"${2 * plane + pair}"], dtype)):
                assert torch.equal(found, of_bytes(wanted, 2 * pair + half))


@pytest.mark.parametrize(
    ("assembly", "offset"), [(decode.CENTRED_FP32, 0.0), (decode.CODES_FP32, 8.0)], ids=["centred", "codes"]
)
def test_codes_in_float32(assembly, offset):
    registers = ptx.run(assembly.value, {"$8": words()})
    for plane, wanted in enumerate((LOW, HIGH)):
        for place in range(4):
            found = torch.from_numpy(registers[f"${4 * plane + place}"].view(np.float32)).double()
            assert torch.equal(found, of_bytes(wanted + offset, place))


def test_codes_are_looked_up():
    table, address = np.linspace(-1, 1.3, 16).astype(np.float32), 0x7F00_1234_5640
    operands = {"$8": words(), "$9": np.full(256, address, dtype=np.uint64)}
    registers = ptx.run(decode.LOOK_UP.value, operands, table, address)
    for plane, wanted in enumerate((LOW, HIGH)):
        for place in range(4):
            found = registers[f"${4 * plane + place}"].view(np.float32)
            assert np.array_equal(found, table[(of_bytes(wanted, place) + 8).long().numpy()])


def all_scales() -> Tensor:
    """Every finite float16."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return every[every.isfinite()]


def parts(scales: Tensor) -> tuple[Tensor, Tensor]:
    """``two_bfloat16`` in torch, by the same operations."""
    wide = scales.float()
    rest = wide - (wide.view(torch.int32) & -65536).view(torch.float32)
    upper = (wide.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return upper, (rest.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def test_every_float16_is_two_bfloat16s():
    scales = all_scales()
    upper, rest = parts(scales)
    assert torch.equal(upper.double() + rest.double(), scales.double())
    # The rest times any code less 8 is exact, so only the fused multiply-add that follows rounds.
    products = torch.arange(-8.0, 8.0, dtype=torch.float64).unsqueeze(1) * rest.double()
    assert torch.equal(products.to(torch.bfloat16).double(), products)


@triton.jit
def _cut_kernel(scales_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    upper, rest = decode.two_bfloat16(tl.load(scales_ptr + offs, mask=offs < N, other=0.0))
    tl.store(out_ptr + offs, upper.to(tl.int16, bitcast=True), mask=offs < N)
    tl.store(out_ptr + N + offs, rest.to(tl.int16, bitcast=True), mask=offs < N)


def test_the_kernel_cuts_scales_in_two_as_is_shown_here(triton_kernels, device):
    scales = all_scales().to(device)
    out = torch.empty(2, scales.numel(), dtype=torch.int16, device=device)
    # The fixture interprets kernels of the package only; this one is interpreted in the same way.
    run = _cut_kernel if device == "cuda" else type(split._sum_parts_kernel)(_cut_kernel.fn)
    run[(triton.cdiv(scales.numel(), 1024),)](scales, out, scales.numel(), BLOCK=1024)
    for found, wanted in zip(out.cpu(), parts(scales.cpu()), strict=True):
        assert torch.equal(found, wanted.view(torch.int16))


def packed_pair(values: Tensor) -> np.ndarray:
    """A scale in both halves of a register, for every word."""
    bits = values.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return bits | (bits << 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaled_weights_are_rounded_once(dtype):
    """All bytes, with scales of every size, give the float32 product rounded once."""
    generator = torch.Generator().manual_seed(0)
    every = all_scales()
    for _ in range(50):
        chosen = every[torch.randint(0, every.numel(), (2, 256), generator=generator)]
        low_scales, high_scales = chosen
        if dtype == torch.float16:
            names = {"$5": low_scales, "$6": low_scales, "$7": high_scales, "$8": high_scales}
            assembly = decode.SCALED_FP16.value
        else:
            (low_upper, low_rest), (high_upper, high_rest) = parts(low_scales), parts(high_scales)
            names = {"$5": low_upper, "$6": low_upper, "$7": low_rest, "$8": low_rest}
            names |= {"$9": high_upper, "$10": high_upper, "$11": high_rest, "$12": high_rest}
            assembly = decode.SCALED_BF16.value
        registers = ptx.run(assembly, {"$4": words()} | {name: packed_pair(value) for name, value in names.items()})
        for plane, (codes, scales) in enumerate(((LOW, low_scales), (HIGH, high_scales))):
            for pair in range(2):
                for half, found in enumerate(halves(registers[f"${2 * plane + pair}"], dtype)):
                    wanted = (of_bytes(codes, 2 * pair + half) * scales.double()).to(dtype).double()
                    assert torch.equal(found, wanted)


def test_a_wrong_selector_would_be_seen():
    broken = decode.UNPACK_BF16.value.replace("0x4342", "0x4341", 1)
    registers = ptx.run(broken, {"$4": words()})
    assert not torch.equal(halves(registers["$1"], torch.bfloat16)[0], of_bytes(LOW, 2))
