/* Vectors of NEON on aarch64: 4 floats. */
#include "common.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define VL 4
#define MR 6
#define TV 4
#define MANY_REGISTERS 1
typedef float32x4_t V;

#define LOAD(p) vld1q_f32(p)
#define STORE(p, v) vst1q_f32(p, v)
#define SET1(x) vdupq_n_f32(x)
#define ZERO() vdupq_n_f32(0.0f)
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define MUL(a, b) vmulq_f32(a, b)
#define ADD(a, b) vaddq_f32(a, b)

INLINE float reduce(V v) { return vaddvq_f32(v); }
INLINE V interleave_low(V a, V b) { return vzip1q_f32(a, b); }
INLINE V interleave_high(V a, V b) { return vzip2q_f32(a, b); }
INLINE V halves(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

INLINE V bytes(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

INLINE void store_halves(uint16_t *p, V v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

INLINE void store_bfloats(uint16_t *p, V v) {
    uint32x4_t bits = vreinterpretq_u32_f32(v), last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint16x4_t rounded = vshrn_n_u32(vaddq_u32(bits, vaddq_u32(last, vdupq_n_u32(0x7FFF))), 16);
    vst1_u16(p, vbsl_u16(vmovn_u32(vceqq_f32(v, v)), rounded, vdup_n_u16(0x7FC0))); /* NaN is not equal to itself */
}

typedef struct {
    uint8x16x4_t table; /* the 16 floats of a codebook, scaled */
    V scale, minimum;
} Group;

INLINE Group group_of(int mode, const float *book, float scale, float minimum) {
    Group group = {.scale = SET1(scale), .minimum = SET1(minimum)};
    if (mode == CODEBOOK_4)
        for (int i = 0; i < 4; i++) group.table.val[i] = vreinterpretq_u8_f32(MUL(LOAD(book + 4 * i), group.scale));
    return group;
}

/* The 16 columns whose codes lie in 16 bytes: in their low nibbles, in their high ones, or in the whole bytes. */
INLINE void decode16(V *out, const uint8_t *codes, int mode, int high, const Group *group) {
    uint8x16_t code = vld1q_u8(codes);
    if (mode <= CODEBOOK_4) code = high ? vshrq_n_u8(code, 4) : vandq_u8(code, vdupq_n_u8(15));
    if (mode == CODEBOOK_4) {
        static const uint8_t spread[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
        static const uint8_t places[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
        for (int i = 0; i < 4; i++) {
            uint8x16_t own = vqtbl1q_u8(code, vaddq_u8(vld1q_u8(spread), vdupq_n_u8((uint8_t)(4 * i))));
            uint8x16_t places_of = vaddq_u8(vshlq_n_u8(own, 2), vld1q_u8(places));
            out[i] = vreinterpretq_f32_u8(vqtbl4q_u8(group->table, places_of));
        }
        return;
    }
    int8x16_t less = vreinterpretq_s8_u8(vsubq_u8(code, vdupq_n_u8(mode == SYMMETRIC_4 ? 8 : 128)));
    int16x8_t low, high_half;
    if (mode == SYMMETRIC_4 || mode == SYMMETRIC_8) { /* a byte below 0 wraps as int8 does */
        low = vmovl_s8(vget_low_s8(less));
        high_half = vmovl_s8(vget_high_s8(less));
    } else {
        low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(code)));
        high_half = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(code)));
    }
    out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    out[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
    out[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high_half)));
    out[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high_half)));
    for (int i = 0; i < 4; i++) {
        out[i] = MUL(out[i], group->scale);
        if (mode == AFFINE_4 || mode == AFFINE_8) out[i] = ADD(out[i], group->minimum);
    }
}

#include "work.h"
#include "rows.h"

void work_neon(const Job *job) { work(job); }
void rows_neon(const RowJob *job) { work_rows(job); }

#endif
