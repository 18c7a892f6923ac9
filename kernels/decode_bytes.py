"""Device functions that decode one plane of 8-bit codes inside a kernel; ``decode`` says how and why for 4 bits.

A byte put into the low bits of a number is a code of 8 bits where the number has so many bits to spare: float16
``0x6400 | code`` is 1024 + code, float32 ``0x4B000000 | code`` is 2^23 + code. bfloat16 has room for 7 bits. So the
upper bit of a code chooses what is subtracted: 128 + (code & 127), less 128 or 256, is code - 128.

A float16 scale times (code - 128) is one rounded multiplication in float16. In bfloat16 a code and the lower part of a
scale have too many bits for an exact product, so all other weights are computed in float32 and rounded at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Four bytes in $2 -> code - 128 in $0 and $1, neighbours in one register.
_CENTRED_FP16 = """
    .reg .b32 offset;
    mov.b32 offset, 0x64806480;
    prmt.b32 $0, $2, 0x64646464, 0x4140;
    prmt.b32 $1, $2, 0x64646464, 0x4342;
    sub.rn.f16x2 $0, $0, offset;
    sub.rn.f16x2 $1, $1, offset;
"""
# Scales in $3 and $4.
_SCALE_FP16 = """
    mul.rn.f16x2 $0, $0, $3;
    mul.rn.f16x2 $1, $1, $4;
"""
# 0xC300 is -128, 0xC380 is -256. bfloat16 has no addition before sm_90; times one, a fused multiply-add is one.
_CENTRED_BF16 = """
    .reg .b32 u, v, one, p;
    mov.b32 one, 0x3F803F80;
    and.b32 u, $2, 0x7F7F7F7F;
    not.b32 v, $2;
    and.b32 v, v, 0x80808080;
    prmt.b32 $0, u, 0x43434343, 0x4140;
    prmt.b32 p, v, 0xC3C3C3C3, 0x4140;
    fma.rn.bf16x2 $0, $0, one, p;
    prmt.b32 $1, u, 0x43434343, 0x4342;
    prmt.b32 p, v, 0xC3C3C3C3, 0x4342;
    fma.rn.bf16x2 $1, $1, one, p;
"""
# Four bytes in $4 -> float32 2^23 + code - OFFSET in $0 to $3.
_FP32 = "".join(
    f"""
    prmt.b32 ${place}, $4, 0x4B000000, 0x754{place};
    sub.rn.f32 ${place}, ${place}, OFFSET;
"""
    for place in range(4)
)

CENTRED_FP16 = tl.constexpr("{" + _CENTRED_FP16 + "}")
CENTRED_BF16 = tl.constexpr("{" + _CENTRED_BF16 + "}")
SCALED_FP16 = tl.constexpr("{" + _CENTRED_FP16 + _SCALE_FP16 + "}")
CODES_FP32 = tl.constexpr("{" + _FP32.replace("OFFSET", "0f4B000000") + "}")
CENTRED_FP32 = tl.constexpr("{" + _FP32.replace("OFFSET", "0f4B000080") + "}")


@triton.jit
def centred_bytes(codes, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """``code - 128`` in DTYPE, which is exact: codes ``[BLOCK_N, BLOCK_J]`` uint8."""
    if ASM and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(CENTRED_BF16, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif ASM and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(CENTRED_FP16, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return bytes_fp32(codes, True, ASM).to(DTYPE)


@triton.jit
def scaled_bytes_fp16(codes, scales):
    """``(code - 128) * scale`` in float16, rounded once: codes ``[BLOCK_N, BLOCK_J]`` uint8, scales float16."""
    return tl.inline_asm_elementwise(
        SCALED_FP16, "=&r,=&r,r,r,r", [codes, scales], dtype=tl.float16, is_pure=True, pack=4
    )


@triton.jit
def bytes_fp32(codes, CENTRED: tl.constexpr, ASM: tl.constexpr):
    """Codes as float32, less 128 if CENTRED: codes ``[BLOCK_N, BLOCK_J]`` uint8."""
    if ASM:
        return tl.inline_asm_elementwise(
            CENTRED_FP32 if CENTRED else CODES_FP32,
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        wide = codes.to(tl.float32)
        if CENTRED:
            wide -= 128.0
        return wide
