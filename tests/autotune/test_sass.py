"""Loops in machine code, both written by hand in the shapes that compilers make, and compiled."""

import pytest
import torch

from mebp_triton.autotune.compile import blank_launch
from mebp_triton.autotune.emulator.driver import compiler_for
from mebp_triton.autotune.sass import LoopCounts, count, cuobjdump, disassemble, main_loops, parse
from mebp_triton.kernels.configs import Problem, TileConfig


def sass(*instructions):
    """A disassembly as cuobjdump prints it, with 16 bytes per instruction and the encodings beside them."""
    lines = [
        f"        /*{16 * i:04x}*/                   {text} ;    /* 0x00000002ff007c0c */"
        for i, text in enumerate(instructions)
    ]
    encoding = "                                                              /* 0x000fda000bf05070 */"
    return "\n".join(["\t\tFunction : _matmul_kernel", *(part for line in lines for part in (line, encoding))])


def test_instructions_are_read():
    one, two = parse(sass("@!P0 LOP3.LUT R1, R2, 0xf, RZ, 0xc0, !PT", "@P1 BRA.U UP0, 0x10"))
    assert (one.address, one.name, one.base) == (0, "LOP3.LUT", "LOP3")
    assert (two.address, two.name, two.operands.strip()) == (16, "BRA.U", "UP0, 0x10")


def test_only_the_main_loop_counts():
    text = sass(
        "I2F.RP R0, R7",  # an integer division before the loop
        "HMMA.16816.F32.BF16 R4, R8, R10, R4",  # peeled
        "LDGSTS.E.128 [R1], [R2.64]",  # 0x20, the loop
        "LDG.E.U16 R7, [R2.64+0x40]",
        "LDG.E.CONSTANT R8, [R2.64]",  # a codebook's number
        "LOP3.LUT R1, R2, 0xf, RZ, 0xc0, !PT",
        "PRMT R3, R1, 0x4140, R5",
        "I2FP.F32.S32 R3, R3",
        "IADD3 R9, R9, 0x40, RZ",
        "HMMA.16816.F32.BF16 R4, R8, R10, R4",
        "@P0 BRA 0x20",
        "I2F.S8 R2, R3",
        "BRA 0xb0",  # where every kernel ends
    )
    (loop,) = main_loops(text)
    assert loop["HMMA.16816.F32.BF16"] == 1 and loop["I2FP.F32.S32"] == 1 and "I2F.S8" not in loop
    counts = {"issue_slots": 9, "matrix": 1, "integer": 3, "unpacking": 2, "conversions": 1, "loads": 1, "copies": 1}
    assert count(loop) == LoopCounts(**counts, tensor="HMMA")


def test_slow_paths_behind_the_kernel_are_no_loops():
    text = sass(
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11]",
        "LOP3.LUT R1, R2, 0xf, RZ, 0xc0, !PT",  # 0x10, the main loop
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2",
        "@!P0 BRA 0xb0",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11]",  # 0x40
        "@P1 BRA 0x10",
        "IMAD R1, R2, R3, R4",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11]",  # 0x70, the second loop
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11]",
        "@P1 BRA.U UP0, 0x70",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2",  # 0xb0, waits
        "@!P0 BRA 0xb0",
        "BRA 0x40",  # back into the middle of the first loop
    )
    first, second = (count(loop) for loop in main_loops(text))
    assert (first.issue_slots, first.matrix, first.tensor) == (5, 1, "UTCHMMA")
    assert (second.issue_slots, second.matrix) == (3, 2)


def test_innermost_only():
    text = sass("IADD3 R1, R1, 0x1, RZ", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24", "@P0 BRA 0x10", "@P1 BRA 0x0")
    (loop,) = main_loops(text)
    assert count(loop) == LoopCounts(issue_slots=2, matrix=1, integer=0, unpacking=0, conversions=0, tensor="HGMMA")


def test_plain_products_count_where_there_are_no_others():
    plain = ("FFMA R1, R2, R3, R1", "FFMA R1, R2, R3, R1", "@P0 BRA 0x0")
    (loop,) = main_loops(sass(*plain))
    assert count(loop).matrix == 2 and count(loop).tensor == "FFMA"
    loops = main_loops(sass(*plain, "HMMA.1688.F32 R4, R8, R10, R4", "@P0 BRA 0x30"))
    assert [count(loop).tensor for loop in loops] == ["HMMA"]
    assert main_loops(sass("IADD3 R1, R1, 0x1, RZ", "@P0 BRA 0x0")) == []


@pytest.mark.parametrize(
    ("target_sm", "tensor"), [(75, "FFMA"), (87, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")]
)
def test_compiled(target_sm, tensor):
    """Of the main loop and the LoRA loop of a real kernel, only the first one unpacks."""
    config = TileConfig(64, 64, 64, num_warps=4, num_stages=2)
    dtype = torch.bfloat16 if target_sm >= 80 else torch.float16
    kernel, arguments = blank_launch(Problem("matmul", 64, 512, 512, dtype=dtype), config)
    options = {**arguments, **config.launch_options()}
    cubin = compiler_for(target_sm).compile(kernel, (), options)[0].cubin
    loops = sorted(map(count, main_loops(disassemble(cubin))), key=lambda loop: loop.issue_slots)
    assert len(loops) == 2 and {loop.tensor for loop in loops} == {tensor}
    lora, main = loops
    decoded = config.block_n * config.block_k / (32 * config.num_warps)
    assert main.unpacking >= 0.7 * decoded > lora.unpacking
    assert lora.matrix < main.matrix
    assert "REG:" in cuobjdump(cubin, "--dump-resource-usage")
