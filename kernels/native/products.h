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

/* Weights of 16 columns of a chunk of 64, by quarters: with 4 bits the last two lie in the high nibbles of the first. */
#define QUARTER(mode, rows, row, chunk, quarter, values, group) \
    decode16(values, codes_at(mode, rows, row, chunk) + 16 * ((mode) <= CODEBOOK_4 ? (quarter) & 1 : (quarter)), mode, \
             (quarter) >> 1, group)

/* out[nr, mt]: products of nr rows of a weight with mt rows of x, straight from the codes; `per` groups in a chunk. */
INLINE void few_of(
    const int mode, const int per, const int nr, const int mt, const Rows *rows, int64_t row, const float *x, int64_t stride,
    int64_t columns, float *out) {
    V sums[2][4][2];
#pragma GCC unroll 2
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 4
        for (int m = 0; m < mt; m++) sums[r][m][0] = sums[r][m][1] = ZERO();
    int64_t chunk = 0;
    for (; chunk + 64 <= columns; chunk += 64)
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; quarter++) {
            V values[2][16 / VL];
#pragma GCC unroll 2
            for (int r = 0; r < nr; r++) {
                Group group = group_at(mode, rows, row + r, chunk + quarter * per / 4 * (64 / per));
                QUARTER(mode, rows, row + r, chunk, quarter, values[r], &group);
            }
#pragma GCC unroll 4
            for (int m = 0; m < mt; m++)
#pragma GCC unroll 4
                for (int i = 0; i < 16 / VL; i++) {
                    V own = LOAD(x + m * stride + chunk + 16 * quarter + i * VL);
#pragma GCC unroll 2
                    for (int r = 0; r < nr; r++)
                        sums[r][m][(quarter * (16 / VL) + i) & 1] =
                            FMA(values[r][i], own, sums[r][m][(quarter * (16 / VL) + i) & 1]);
                }
        }
#pragma GCC unroll 2
    for (int r = 0; r < nr; r++)
#pragma GCC unroll 4
        for (int m = 0; m < mt; m++) out[r * 4 + m] = reduce(ADD(sums[r][m][0], sums[r][m][1]));
    for (; chunk < columns; chunk += 16) { /* what is left of a chunk; groups that only pad it are not read */
        int64_t width = columns - chunk < 16 ? columns - chunk : 16;
        int quarter = (int)(chunk & 63) / 16;
        for (int r = 0; r < nr; r++) {
            V values[16 / VL];
            Group group = group_at(mode, rows, row + r, chunk);
            QUARTER(mode, rows, row + r, chunk - 16 * quarter, quarter, values, &group);
            for (int m = 0; m < mt; m++) {
                float own[16] = {0};
                memcpy(own, x + m * stride + chunk, width * sizeof(float));
                V rest = MUL(values[0], LOAD(own));
                for (int i = 1; i < 16 / VL; i++) rest = FMA(values[i], LOAD(own + i * VL), rest);
                out[r * 4 + m] += reduce(rest);
            }
        }
    }
}

#define FEW(nr, mt) few_of(mode, per, nr, mt, rows, row, x, stride, columns, out + 4 * row)

/* `few_of` for all rows: two at a time where there are registers for their sums. */
INLINE void few_rows(
    const int mode, const int per, const Rows *rows, int64_t count, int mt, const float *x, int64_t stride, int64_t columns,
    float *out) {
    int64_t row = 0;
    if (mt == 1) for (; row + 2 <= count; row += 2) FEW(2, 1);
    if (mt == 2) for (; row + 2 <= count; row += 2) FEW(2, 2);
    if (mt == 3 && MANY_REGISTERS) for (; row + 2 <= count; row += 2) FEW(2, 3);
    if (mt == 4 && MANY_REGISTERS) for (; row + 2 <= count; row += 2) FEW(2, 4);
    for (; row < count; row++)
        switch (mt) {
            case 1: FEW(1, 1); break;
            case 2: FEW(1, 2); break;
            case 3: FEW(1, 3); break;
            default: FEW(1, 4);
        }
}

/* One block of a weight's rows with at most FEW_TOKENS tokens, four at a time. */
static void multiply_few(const Job *job, const Weight *w, int64_t first, int64_t count, float *room) {
    float book[16], out[4 * BLOCK_ROWS] = {0};
    Rows rows = rows_of(w, first, count, 0, job->columns, table_of(w, book), room);
    for (int64_t token = 0; token < job->m; token += 4) {
        const float *x = job->operand + token * job->operand_stride;
        int mt = (int)(job->m - token < 4 ? job->m - token : 4);
#define FEW_ROWS(mode, per) few_rows(mode, per, &rows, count, mt, x, job->operand_stride, job->columns, out)
        BY_FORM(w, FEW_ROWS)
        for (int m = 0; m < mt; m++)
            for (int64_t n = 0; n < count; n++) {
                float sum = out[4 * n + m];
                const float *t = w->t + (token + m) * w->t_stride, *b = w->b + (first + n) * w->b_stride;
                float low = 0.0f;
                for (int64_t r = 0; r < w->rank; r++) low += t[r] * b[r];
                if (w->rank) sum += low;
                if (w->bias) sum += w->bias[first + n];
                w->operand[(token + m) * w->operand_stride + first + n] = sum;
            }
    }
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

#define FEW_DX (VL == 16 ? 4 : 2) /* tokens whose sums fit into registers */

/* sums[mt, 64] += dY[mt, count] · W[count, 64] of one chunk, straight from the codes. */
INLINE void few_dx_of(
    const int mode, const int per, const int mt, const Rows *rows, int64_t count, int64_t chunk, const float *dy,
    int64_t stride, float *sums) {
    const int quarters = VL == 16 || (VL == 4 && mt == 1) ? 4 : 2;
#pragma GCC unroll 2
    for (int first = 0; first < 4; first += quarters) {
        V own[4][4][16 / VL];
#pragma GCC unroll 4
        for (int m = 0; m < mt; m++)
#pragma GCC unroll 4
            for (int q = 0; q < quarters; q++)
#pragma GCC unroll 4
                for (int i = 0; i < 16 / VL; i++) own[m][q][i] = LOAD(sums + 64 * m + 16 * (first + q) + i * VL);
        for (int64_t row = 0; row < count; row++)
#pragma GCC unroll 4
            for (int q = 0; q < quarters; q++) {
                V values[16 / VL];
                Group group = group_at(mode, rows, row, chunk + (first + q) * per / 4 * (64 / per));
                QUARTER(mode, rows, row, chunk, first + q, values, &group);
#pragma GCC unroll 4
                for (int m = 0; m < mt; m++)
#pragma GCC unroll 4
                    for (int i = 0; i < 16 / VL; i++) own[m][q][i] = FMA(SET1(dy[m * stride + row]), values[i], own[m][q][i]);
            }
#pragma GCC unroll 4
        for (int m = 0; m < mt; m++)
#pragma GCC unroll 4
            for (int q = 0; q < quarters; q++)
#pragma GCC unroll 4
                for (int i = 0; i < 16 / VL; i++) STORE(sums + 64 * m + 16 * (first + q) + i * VL, own[m][q][i]);
    }
}

INLINE void few_dx_tokens(
    const int mode, const int per, const Rows *rows, int64_t count, int mt, int64_t chunk, const float *dy, int64_t stride,
    float *sums) {
    switch (mt) {
        case 1: few_dx_of(mode, per, 1, rows, count, chunk, dy, stride, sums); break;
        case 2: few_dx_of(mode, per, 2, rows, count, chunk, dy, stride, sums); break;
#if VL == 16
        case 3: few_dx_of(mode, per, 3, rows, count, chunk, dy, stride, sums); break;
        case 4: few_dx_of(mode, per, 4, rows, count, chunk, dy, stride, sums); break;
#endif
    }
}

/* dX of one chunk of columns and few tokens. */
static void few_dx_block(const Job *job, int64_t chunk, float *room) {
    float book[16], sums[FEW_TOKENS_DX * 64], part[FEW_DX * 64];
    int64_t columns = job->columns - chunk < 64 ? job->columns - chunk : 64;
    memset(sums, 0, sizeof sums);
    for (int64_t i = 0; i < job->count; i++) {
        const Weight *w = &job->weights[i];
        for (int64_t first = 0; first < w->rows; first += BLOCK_ROWS) {
            int64_t count = w->rows - first < BLOCK_ROWS ? w->rows - first : BLOCK_ROWS;
            Rows rows = rows_of(w, first, count, chunk, chunk + 64, table_of(w, book), room);
            for (int64_t token = 0; token < job->m; token += FEW_DX) {
                int mt = (int)(job->m - token < FEW_DX ? job->m - token : FEW_DX);
                const float *dy = w->operand + token * w->operand_stride + first;
                memset(part, 0, sizeof part);
#define FEW_DX_TOKENS(mode, per) few_dx_tokens(mode, per, &rows, count, mt, chunk, dy, w->operand_stride, part)
                BY_FORM(w, FEW_DX_TOKENS)
                for (int64_t k = 0; k < mt * 64; k += VL)
                    STORE(sums + token * 64 + k, ADD(LOAD(sums + token * 64 + k), LOAD(part + k)));
            }
        }
    }
    for (int64_t m = 0; m < job->m; m++) {
        float *own = sums + m * 64, *to = job->operand + m * job->operand_stride + chunk;
        for (int64_t k = 0; k < columns && job->accumulate; k++) own[k] += to[k];
        for (int64_t r = 0; r < job->rank; r++) {
            float g = job->g[m * job->g_stride + r];
            const float *a = job->a + r * job->a_stride + chunk;
            for (int64_t k = 0; k < columns; k++) own[k] += g * a[k];
        }
        memcpy(to, own, columns * sizeof(float));
    }
}
