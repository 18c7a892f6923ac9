"""Device functions that decode packed weights inside a kernel; ``weight_tiles`` loads what they decode.

This file knows codes of 4 bits, and ``decode_bytes`` those of 8 bits.

Where the compiler emits PTX, codes become floats without a conversion instruction (as in FasterTransformer, arXiv
2211.10017). A code put into the low bits of a number with a large enough exponent is that number plus the code:
bfloat16 ``0x4300 | code`` is 128 + code, float16 ``0x6400 | code`` is 1024 + code, float32 ``0x4B000000 | code`` is
2^23 + code. Subtracting the number is exact. Four bytes give eight weights in seven integer instructions. A plain twin
of each function runs everywhere, Triton's interpreter included, and gives the same bits.

A weight must be rounded once, so that it has the bits that plain torch gives it. In float16, a float16 scale times
(code - 8) is one rounded multiplication. In bfloat16, the scale is split exactly into two bfloat16 numbers,
``upper + rest``. ``c * rest`` has few enough bits to be exact, so ``fma(c, upper, c * rest)`` rounds once. All other
weights are computed in float32 and rounded at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_bytes import bytes_fp32, centred_bytes, scaled_bytes_fp16

# Four bytes in $4 -> four low nibbles in $0 and $1, and four high ones in $2 and $3. Each is the low byte of 16 bits,
# with MAGIC as the high byte. The order of the bytes is kept, so register pairs hold neighbouring columns.
_NIBBLES = """
    .reg .b32 l, h;
    and.b32 l, $4, 0x0F0F0F0F;
    shr.u32 h, $4, 4;
    and.b32 h, h, 0x0F0F0F0F;
    prmt.b32 $0, l, MAGIC, 0x4140;
    prmt.b32 $1, l, MAGIC, 0x4342;
    prmt.b32 $2, h, MAGIC, 0x4140;
    prmt.b32 $3, h, MAGIC, 0x4342;
"""
# Pairs of code - 8. bfloat16 has no subtraction before sm_90, so this is a fused multiply-add; times one is exact.
_UNPACK_BF16 = (
    _NIBBLES.replace("MAGIC", "0x43434343")
    + """
    .reg .b32 one, offset;
    mov.b32 one, 0x3F803F80;
    mov.b32 offset, 0xC308C308;
"""
    + "".join(f"    fma.rn.bf16x2 ${register}, ${register}, one, offset;\n" for register in range(4))
)
_UNPACK_FP16 = (
    _NIBBLES.replace("MAGIC", "0x64646464")
    + """
    .reg .b32 offset;
    mov.b32 offset, 0x64086408;
"""
    + "".join(f"    sub.rn.f16x2 ${register}, ${register}, offset;\n" for register in range(4))
)
# Upper parts of the low plane's four scales in $5 and $6, their rests in $7 and $8; the high plane's in $9 to $12.
# bfloat16 has no multiplication before sm_90; a fused multiply-add that adds -0 is one.
_SCALE_BF16 = """
    .reg .b32 none, p;
    mov.b32 none, 0x80008000;
    fma.rn.bf16x2 p, $0, $7, none;
    fma.rn.bf16x2 $0, $0, $5, p;
    fma.rn.bf16x2 p, $1, $8, none;
    fma.rn.bf16x2 $1, $1, $6, p;
    fma.rn.bf16x2 p, $2, $11, none;
    fma.rn.bf16x2 $2, $2, $9, p;
    fma.rn.bf16x2 p, $3, $12, none;
    fma.rn.bf16x2 $3, $3, $10, p;
"""
# Scales of the low plane in $5 and $6, those of the high plane in $7 and $8.
_SCALE_FP16 = """
    mul.rn.f16x2 $0, $0, $5;
    mul.rn.f16x2 $1, $1, $6;
    mul.rn.f16x2 $2, $2, $7;
    mul.rn.f16x2 $3, $3, $8;
"""
# Four bytes in $8 -> four low nibbles in $0 to $3 and four high ones in $4 to $7, as float32 2^23 + code - OFFSET.
_UNPACK_FP32 = """
    .reg .b32 l, h;
    and.b32 l, $8, 0x0F0F0F0F;
    shr.u32 h, $8, 4;
    and.b32 h, h, 0x0F0F0F0F;
    prmt.b32 $0, l, 0x4B000000, 0x7540;
    prmt.b32 $1, l, 0x4B000000, 0x7541;
    prmt.b32 $2, l, 0x4B000000, 0x7542;
    prmt.b32 $3, l, 0x4B000000, 0x7543;
    prmt.b32 $4, h, 0x4B000000, 0x7540;
    prmt.b32 $5, h, 0x4B000000, 0x7541;
    prmt.b32 $6, h, 0x4B000000, 0x7542;
    prmt.b32 $7, h, 0x4B000000, 0x7543;
""" + "".join(f"    sub.rn.f32 ${register}, ${register}, OFFSET;\n" for register in range(8))

# Four bytes in $8, the address of 16 float32 numbers in $9 -> the numbers that the low nibbles name in $0 to $3, and
# those that the high nibbles name in $4 to $7. The table is one cache line, which a warp reads without a conflict. The
# reads are assembly because the compiler's pipeline would first copy every weight to shared memory on its own.
_LOOK_UP = """
    .reg .b32 c;
    .reg .b64 a;
""" + "".join(
    f"""
    shr.u32 c, $8, {8 * place + 4 * plane};
    and.b32 c, c, 15;
    mad.wide.u32 a, c, 4, $9;
    ld.global.nc.f32 ${4 * plane + place}, [a];
"""
    for plane in range(2)
    for place in range(4)
)

LOOK_UP = tl.constexpr("{" + _LOOK_UP + "}")
UNPACK_BF16 = tl.constexpr("{" + _UNPACK_BF16 + "}")
UNPACK_FP16 = tl.constexpr("{" + _UNPACK_FP16 + "}")
SCALED_BF16 = tl.constexpr("{" + _UNPACK_BF16 + _SCALE_BF16 + "}")
SCALED_FP16 = tl.constexpr("{" + _UNPACK_FP16 + _SCALE_FP16 + "}")
CODES_FP32 = tl.constexpr("{" + _UNPACK_FP32.replace("OFFSET", "0f4B000000") + "}")
CENTRED_FP32 = tl.constexpr("{" + _UNPACK_FP32.replace("OFFSET", "0f4B000008") + "}")


@triton.jit
def unpack_centred(packed, packed_high, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Both planes ``[BLOCK_N, BLOCK_J]`` of ``packed_planes`` as ``code - 8`` (or 128) in DTYPE, which is exact."""
    if BITS == 8:
        return centred_bytes(packed, DTYPE, ASM), centred_bytes(packed_high, DTYPE, ASM)
    elif ASM and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            UNPACK_BF16, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif ASM and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            UNPACK_FP16, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low, high = unpack_fp32(packed, True, ASM)
        return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def unpack_fp32(packed, CENTRED: tl.constexpr, ASM: tl.constexpr):
    """Both planes of ``packed`` as codes in float32, less 8 if CENTRED."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            CENTRED_FP32 if CENTRED else CODES_FP32,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        low = (packed & 0xF).to(tl.float32)
        high = (packed >> 4).to(tl.float32)
        if CENTRED:
            low -= 8.0
            high -= 8.0
    return low, high


@triton.jit
def look_up(packed, codebook_ptr, ASM: tl.constexpr):
    """Both planes of ``packed`` as the codebook's numbers: codebook_ptr ``[16]`` float32."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            LOOK_UP,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,l,l,l,l",
            [packed, codebook_ptr.to(tl.int64)],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        low = tl.load(codebook_ptr + (packed & 0xF).to(tl.int32))
        high = tl.load(codebook_ptr + (packed >> 4).to(tl.int32))
    return low, high


@triton.jit
def decode_planes(
    codes,
    codebook_ptr,
    BITS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Decodes what ``load_codes`` has loaded into the low and the high plane, each ``[BLOCK_N, BLOCK_K // 2]``.

    codebook_ptr ``[16]`` float32. Rows that were not read decode to finite values. The bits are those that plain torch
    gives (``reference.decode``).
    """
    packed, packed_high, scales_low, scales_high, minima_low, minima_high, super_scales, super_minima = codes
    # A code (4 or 8 bits) times a float16 scale (11 bits) needs no rounding in float32 (24 bits). Nor does a code of
    # 4 bits times a scale of two levels (8 bits and 11).
    FLOAT16: tl.constexpr = scales_low.dtype == tl.float16
    EXACT: tl.constexpr = FLOAT16 or (BITS == 4 and scales_low.dtype == tl.int8)
    if scales_low.dtype == tl.int8:
        scales_low, scales_high = both_levels(scales_low, super_scales), both_levels(scales_high, super_scales)
        if HAS_MINIMUM:
            minima_low, minima_high = both_levels(minima_low, super_minima), both_levels(minima_high, super_minima)
    if BITS == 8:
        low = _decode_bytes(packed, scales_low, minima_low, HAS_MINIMUM, EXACT, DTYPE, ASM)
        high = _decode_bytes(packed_high, scales_high, minima_high, HAS_MINIMUM, EXACT, DTYPE, ASM)
    elif HAS_CODEBOOK:
        low, high = look_up(packed, codebook_ptr, ASM)
        low = (low * scales_low.to(tl.float32)).to(DTYPE)
        high = (high * scales_high.to(tl.float32)).to(DTYPE)
    elif HAS_MINIMUM:
        low, high = unpack_fp32(packed, False, ASM)
        low = affine(low, scales_low, minima_low, EXACT).to(DTYPE)
        high = affine(high, scales_high, minima_high, EXACT).to(DTYPE)
    elif ASM and FLOAT16 and tl.float16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            SCALED_FP16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [packed, scales_low, scales_high],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    elif ASM and FLOAT16 and tl.bfloat16 == DTYPE:
        upper_low, rest_low = two_bfloat16(scales_low)
        upper_high, rest_high = two_bfloat16(scales_high)
        low, high = tl.inline_asm_elementwise(
            SCALED_BF16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [packed, upper_low, rest_low, upper_high, rest_high],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = unpack_fp32(packed, True, ASM)
        low = (low * scales_low.to(tl.float32)).to(DTYPE)
        high = (high * scales_high.to(tl.float32)).to(DTYPE)
    return low, high


@triton.jit
def both_levels(values, supers):
    """Scales (or minima) of two levels in float32: bytes times float16 numbers, which needs no rounding.

    A byte becomes a float as a code does: put into the low bits of 2^23 + 128 + byte.
    """
    wide = ((values.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
    return wide * supers.to(tl.float32)


@triton.jit
def _decode_bytes(
    codes,
    scales,
    minima,
    HAS_MINIMUM: tl.constexpr,
    EXACT: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """One plane of 8-bit codes ``[BLOCK_N, BLOCK_J]`` as weights in DTYPE, rounded once."""
    if HAS_MINIMUM:
        return affine(bytes_fp32(codes, False, ASM), scales, minima, EXACT).to(DTYPE)
    elif ASM and EXACT and tl.float16 == DTYPE:
        return scaled_bytes_fp16(codes, scales)
    else:
        return (bytes_fp32(codes, True, ASM) * scales.to(tl.float32)).to(DTYPE)


@triton.jit
def two_bfloat16(scales):
    """Splits float16 numbers exactly into two bfloat16 ones: the upper eight bits, and the three that are left.

    The bits are cut off by integer instructions, because conversions would round, and run at a quarter of the rate.
    """
    wide = scales.to(tl.float32)
    bits = wide.to(tl.int32, bitcast=True)
    rest = wide - (bits & -65536).to(tl.float32, bitcast=True)
    upper = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return upper, (rest.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def affine(codes, scales, minima, EXACT: tl.constexpr):
    """``codes * scales + minima`` in float32.

    EXACT: the product needs no rounding, so a fused multiply-add gives the same bits in one instruction.
    """
    scales = scales.to(tl.float32)
    minima = minima.to(tl.float32)
    if EXACT:
        return tl.fma(codes, tl.broadcast_to(scales, codes.shape), tl.broadcast_to(minima, codes.shape))
    else:
        return codes * scales + minima
