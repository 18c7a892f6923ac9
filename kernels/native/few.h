/* Products of few tokens, for one instruction set: codes are multiplied as they are decoded and kept nowhere. */

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
    for (; chunk + 64 <= columns; chunk += 64) {
#pragma GCC unroll 2
        for (int r = 0; r < nr; r++) __builtin_prefetch(codes_at(mode, rows, row + r, chunk) + 4096);
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
