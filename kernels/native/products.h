/* Products with packed weights, for one instruction set. Included once for each, after `decode.h`.

   A tile of outputs is kept in registers: MR rows, TV vectors wide. Its left operand gives one number at a time, its
   right one vectors. In Y = X·Wᵀ the decoded weights are on the left, so that no weight is transposed, and X is, once.
   In dX = dY·W they are on the right. Sums run over at most DEPTH terms before they are added to the others. */

#define NR (TV * VL)

INLINE void tile_of(
    const int mr, const int tv, const int chains, const float *a, int64_t lda, const float *b, int64_t depth, float *c,
    int64_t ldc, int add) {
    V sums[4][MR][TV];
#pragma GCC unroll 4
    for (int s = 0; s < chains; s++)
#pragma GCC unroll 12
        for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
            for (int j = 0; j < tv; j++) sums[s][i][j] = ZERO();
    int64_t k = 0;
    for (; k + chains <= depth; k += chains)
#pragma GCC unroll 4
        for (int s = 0; s < chains; s++) {
            V right[TV];
#pragma GCC unroll 4
            for (int j = 0; j < tv; j++) right[j] = LOAD(b + (k + s) * NR + j * VL);
#pragma GCC unroll 12
            for (int i = 0; i < mr; i++) {
                V left = SET1(a[i * lda + k + s]);
#pragma GCC unroll 4
                for (int j = 0; j < tv; j++) sums[s][i][j] = FMA(left, right[j], sums[s][i][j]);
            }
        }
    for (; k < depth; k++)
#pragma GCC unroll 12
        for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
            for (int j = 0; j < tv; j++) sums[0][i][j] = FMA(SET1(a[i * lda + k]), LOAD(b + k * NR + j * VL), sums[0][i][j]);
#pragma GCC unroll 12
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < tv; j++) {
            V sum = sums[0][i][j];
            if (chains > 1) sum = ADD(sum, sums[1][i][j]);
            if (chains > 2) sum = ADD(sum, ADD(sums[2][i][j], sums[3][i][j]));
            float *at = c + i * ldc + j * VL;
            STORE(at, add ? ADD(LOAD(at), sum) : sum);
        }
}

#define TILE(mr, chains) \
    case mr: \
        if (narrow) tile_of(mr, 1, chains, a, lda, b, depth, c, ldc, add); \
        else tile_of(mr, TV, chains, a, lda, b, depth, c, ldc, add); \
        break;

/* c[rows, columns] (+)= a[rows, depth] · b[depth, NR]. Whole vectors are written: one if `narrow`, or TV. */
static void tile(
    int64_t rows, int narrow, const float *a, int64_t lda, const float *b, int64_t depth, float *c, int64_t ldc, int add) {
    switch (rows) {
        TILE(1, 4)
        TILE(2, 2)
        TILE(3, 2)
        TILE(4, 1)
        TILE(5, 1)
        TILE(6, 1)
#if MR > 6
        TILE(7, 1)
        TILE(8, 1)
        TILE(9, 1)
        TILE(10, 1)
        TILE(11, 1)
        TILE(12, 1)
#endif
    }
}

/* rows[VL] becomes its transpose: perfect interleavings of both halves, log2(VL) times. */
INLINE void transpose(V *rows) {
    V other[VL];
#pragma GCC unroll 4
    for (int step = 1; step < VL; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) other[i] = rows[i];
#pragma GCC unroll 8
        for (int i = 0; i < VL / 2; i++) {
            rows[2 * i] = interleave_low(other[i], other[i + VL / 2]);
            rows[2 * i + 1] = interleave_high(other[i], other[i + VL / 2]);
        }
    }
}

/* Columns `first:last` of x[m, ...] as rows of NR numbers each: what missing rows of x give is 0. */
static void pack_columns(const float *x, int64_t stride, int64_t m, int64_t first, int64_t last, float *out) {
    float rest[VL * VL];
    V rows[VL];
    for (int64_t part = 0; part < NR; part += VL)
        for (int64_t k = first; k < last; k += VL) {
            int64_t width = last - k < VL ? last - k : VL, height = m - part < 0 ? 0 : m - part < VL ? m - part : VL;
            const float *from = x + part * stride + k;
            int64_t step = stride;
            if (width < VL || height < VL) {
                memset(rest, 0, sizeof rest);
                for (int64_t i = 0; i < height; i++) memcpy(rest + i * VL, from + i * stride, width * sizeof(float));
                from = rest;
                step = VL;
            }
            for (int i = 0; i < VL; i++) rows[i] = LOAD(from + i * step);
            transpose(rows);
            for (int i = 0; i < width; i++) STORE(out + (k - first + i) * NR + part, rows[i]);
        }
}

/* y[m, n] = sums[n, m] + bias. */
static void store_transposed(
    const float *sums, int64_t stride, int64_t m, int64_t n, const float *bias, float *y, int64_t y_stride) {
    V rows[VL];
    for (int64_t j = 0; j < n; j += VL) {
        int64_t width = n - j < VL ? n - j : VL;
        float own[VL] = {0};
        if (bias) memcpy(own, bias + j, width * sizeof(float));
        for (int64_t i = 0; i < m; i += VL) {
            for (int r = 0; r < VL; r++) rows[r] = r < width ? LOAD(sums + (j + r) * stride + i) : ZERO();
            transpose(rows);
            for (int r = 0; r < VL && i + r < m; r++) {
                V row = bias ? ADD(rows[r], LOAD(own)) : rows[r];
                float *at = y + (i + r) * y_stride + j, rest[VL];
                if (width == VL) {
                    STORE(at, row);
                } else {
                    STORE(rest, row);
                    memcpy(at, rest, width * sizeof(float));
                }
            }
        }
    }
}

/* One block of a weight's rows with a block of at most BLOCK_TOKENS tokens, whose X lies packed in `panels`. */
static void multiply_block(
    const Job *job, const Weight *w, int64_t first_token, int64_t tokens, int64_t first, int64_t count, int64_t depth_of_panel,
    int64_t place_of_t, const float *panels, float *room) {
    int64_t stride = tokens_of_block(job);
    float book[16], *sums = room, *left = sums + BLOCK_ROWS * stride, *scales = left + BLOCK_ROWS * DEPTH;
    Rows rows = rows_of(w, first, count, 0, job->columns, table_of(w, book), scales);
    for (int64_t k = 0; k < job->columns + w->rank; k += DEPTH) {
        int64_t depth = job->columns - k < DEPTH ? job->columns - k : DEPTH;
        if (depth > 0) decode_span(w->mode, &rows, 0, count, k, k + depth, left, DEPTH, 32);
        for (int64_t token = 0; token < tokens && depth > 0; token += NR) {
            const float *right = panels + token * depth_of_panel + k * NR;
            for (int64_t row = 0; row < count; row += MR)
                tile(count - row < MR ? count - row : MR, tokens - token <= VL, left + row * DEPTH, DEPTH, right, depth,
                           sums + row * stride + token, stride, k > 0);
        }
        if (k + DEPTH >= job->columns) break;
    }
    for (int64_t token = 0; token < tokens && w->rank; token += NR) {
        const float *right = panels + token * depth_of_panel + place_of_t * NR;
        for (int64_t row = 0; row < count; row += MR)
            tile(count - row < MR ? count - row : MR, tokens - token <= VL, w->b + (first + row) * w->b_stride,
                       w->b_stride, right, w->rank, sums + row * stride + token, stride, 1);
    }
    store_transposed(sums, stride, tokens, count, w->bias ? w->bias + first : 0,
                           w->operand + first_token * w->operand_stride + first, w->operand_stride);
}

/* dX of `width` columns from `first` on, at most 64, of all tokens. */
static void dx_block(const Job *job, int64_t first, int64_t width, float *room) {
    float book[16], *right = room, *edge = right + 64 * DEPTH, *scales = edge + MR * NR;
    int64_t columns = first + width <= job->columns ? width : job->columns - first;
    int add = job->accumulate != 0;
    for (int64_t i = 0; i < job->count + (job->rank > 0); i++) {
        const Weight *w = i < job->count ? &job->weights[i] : 0;
        const float *from = w ? w->operand : job->g;
        int64_t stride = w ? w->operand_stride : job->g_stride, terms = w ? w->rows : job->rank;
        for (int64_t n = 0; n < terms; n += DEPTH) {
            int64_t depth = terms - n < DEPTH ? terms - n : DEPTH;
            /* Panels of NR columns, each [depth, NR]; a run of 32 columns fills one, or two halves of them. */
            if (w) {
                float *run = scales + 2 * BLOCK_ROWS * (64 / 16 + 1);
                for (int64_t row = 0; row < depth; row += BLOCK_ROWS) {
                    int64_t count = depth - row < BLOCK_ROWS ? depth - row : BLOCK_ROWS;
                    Rows rows = rows_of(w, n + row, count, first, first + width, table_of(w, book), scales);
                    if (NR == 32) {
                        decode_span(w->mode, &rows, 0, count, first, first + width, right + row * NR, NR, depth * NR);
                        continue;
                    }
                    decode_span(w->mode, &rows, 0, count, first, first + width, run, 64, 32);
                    for (int64_t r = 0; r < count; r++)
                        for (int64_t c = 0; c < width; c += NR)
                            memcpy(right + c * depth + (row + r) * NR, run + 64 * r + c, NR * sizeof(float));
                }
            } else {
                for (int64_t r = 0; r < depth; r++)
                    for (int64_t c = 0; c < width; c += NR) {
                        int64_t there = columns - c < 0 ? 0 : columns - c < NR ? columns - c : NR;
                        float *to = right + c * depth + r * NR;
                        memset(to + there, 0, (NR - there) * sizeof(float));
                        memcpy(to, job->a + (n + r) * job->a_stride + first + c, there * sizeof(float));
                    }
            }
            for (int64_t token = 0; token < job->m; token += MR) {
                int64_t height = job->m - token < MR ? job->m - token : MR;
                for (int64_t c = 0; c < columns; c += NR) {
                    float *to = job->operand + token * job->operand_stride + first + c;
                    const float *left = from + token * stride + n;
                    if (c + NR <= columns) {
                        tile(height, 0, left, stride, right + c * depth, depth, to, job->operand_stride, add);
                        continue;
                    }
                    tile(height, 0, left, stride, right + c * depth, depth, edge, NR, 0);
                    for (int64_t r = 0; r < height; r++)
                        for (int64_t j = 0; j < columns - c; j++) {
                            float *one = to + r * job->operand_stride + j;
                            *one = add ? *one + edge[r * NR + j] : edge[r * NR + j];
                        }
                }
            }
            add = 1;
        }
    }
}
