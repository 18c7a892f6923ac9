/* Vectors of AVX-512: 16 floats. A table of 16 decoded weights is one register, and a code picks from it. */
#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define VL 16
#define MR 12
#define TV 2
#define MANY_REGISTERS 1
typedef __m512 V;

#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define SET1(x) _mm512_set1_ps(x)
#define ZERO() _mm512_setzero_ps()
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define ADD(a, b) _mm512_add_ps(a, b)

INLINE float reduce(V v) { return _mm512_reduce_add_ps(v); }

INLINE V interleave_low(V a, V b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}

INLINE V interleave_high(V a, V b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}

INLINE V halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE V bytes(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }

INLINE void store_halves(uint16_t *p, V v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

INLINE void store_bfloats(uint16_t *p, V v) {
    __m512i bits = _mm512_castps_si512(v), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF))), 16);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(bits));
}

typedef struct {
    V table, scale, minimum;
} Group;

INLINE Group group_of(int mode, const float *book, float scale, float minimum) {
    Group group = {ZERO(), SET1(scale), SET1(minimum)};
    if (mode <= CODEBOOK_4) group.table = MUL(LOAD(book), group.scale);
    if (mode == AFFINE_4) group.table = ADD(group.table, group.minimum);
    return group;
}

/* The 16 columns whose codes lie in 16 bytes: in their low nibbles, in their high ones, or in the whole bytes. */
INLINE void decode16(V *out, const uint8_t *codes, int mode, int high, const Group *group) {
    __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    if (mode <= CODEBOOK_4) {
        if (high) index = _mm512_srli_epi32(index, 4);
        out[0] = _mm512_permutexvar_ps(index, group->table); /* takes the low 4 bits of an index */
        return;
    }
    if (mode == SYMMETRIC_8) index = _mm512_sub_epi32(index, _mm512_set1_epi32(128));
    out[0] = MUL(_mm512_cvtepi32_ps(index), group->scale);
    if (mode == AFFINE_8) out[0] = ADD(out[0], group->minimum);
}

#include "work.h"
#include "rows.h"

void work_avx512(const Job *job) { work(job); }
void rows_avx512(const RowJob *job) { work_rows(job); }

END_TARGET

#endif
