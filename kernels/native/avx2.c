/* Vectors of AVX2: 8 floats. Products use FMA, and float16 numbers are read by F16C. */
#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c")

#define VL 8
#define MR 6
#define TV 2
#define MANY_REGISTERS 0
typedef __m256 V;

#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define SET1(x) _mm256_set1_ps(x)
#define ZERO() _mm256_setzero_ps()
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define ADD(a, b) _mm256_add_ps(a, b)

INLINE float reduce(V v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

INLINE V interleave_low(V a, V b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}

INLINE V interleave_high(V a, V b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

INLINE V halves(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE V bytes(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }

INLINE void store_halves(uint16_t *p, V v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

INLINE void store_bfloats(uint16_t *p, V v) {
    __m256i bits = _mm256_castps_si256(v), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7FC0), nan);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}

typedef struct {
    V low, high, scale, minimum; /* low, high: the table of a codebook, scaled */
} Group;

INLINE Group group_of(int mode, const float *book, float scale, float minimum) {
    Group group = {ZERO(), ZERO(), SET1(scale), SET1(minimum)};
    if (mode == CODEBOOK_4) {
        group.low = MUL(LOAD(book), group.scale);
        group.high = MUL(LOAD(book + 8), group.scale);
    }
    return group;
}

/* The 16 columns whose codes lie in 16 bytes: in their low nibbles, in their high ones, or in the whole bytes. */
INLINE void decode16(V *out, const uint8_t *codes, int mode, int high, const Group *group) {
    for (int i = 0; i < 2; i++) {
        __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + 8 * i)));
        if (mode <= CODEBOOK_4) code = high ? _mm256_srli_epi32(code, 4) : _mm256_and_si256(code, _mm256_set1_epi32(15));
        if (mode == CODEBOOK_4) {
            __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)); /* bit 3 of the code as the sign */
            out[i] = _mm256_blendv_ps(
                _mm256_permutevar8x32_ps(group->low, code), _mm256_permutevar8x32_ps(group->high, code), upper);
            continue;
        }
        if (mode == SYMMETRIC_4) code = _mm256_sub_epi32(code, _mm256_set1_epi32(8));
        if (mode == SYMMETRIC_8) code = _mm256_sub_epi32(code, _mm256_set1_epi32(128));
        out[i] = MUL(_mm256_cvtepi32_ps(code), group->scale);
        if (mode == AFFINE_4 || mode == AFFINE_8) out[i] = ADD(out[i], group->minimum);
    }
}

#include "work.h"
#include "rows.h"

void work_avx2(const Job *job) { work(job); }
void rows_avx2(const RowJob *job) { work_rows(job); }

END_TARGET

#endif
