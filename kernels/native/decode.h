/* Codes and scales of rows to floats, for one instruction set. Included once for each, after its vectors. */

/* Scales or minima of `count` rows as floats, [groups, BLOCK_ROWS]. */
static void floats_of(
    const Weight *w, const void *values, int64_t stride, const uint16_t *supers, int64_t super_stride, int64_t first,
    int64_t count, int64_t first_group, int64_t groups, float *out) {
    const int64_t size = w->scales_kind == SCALES_TWO_LEVEL ? 1 : w->scales_kind == SCALES_HALF ? 2 : 4;
    float super_line[BLOCK_ROWS];
    char rest[BLOCK_ROWS * 4] = {0}, super_rest[BLOCK_ROWS * 2] = {0};
    int64_t stretch = -1;
    for (int64_t g = 0; g < groups; g++, out += BLOCK_ROWS) {
        const char *from = (const char *)values + ((first_group + g) * stride + first) * size;
        /* Rows to come: their numbers lie in another cache line for each group. */
        __builtin_prefetch(from + 2 * BLOCK_ROWS * size);
        if (count % VL) from = memcpy(rest, from, count * size);
        if (w->scales_kind == SCALES_FLOAT) {
            memcpy(out, from, count * sizeof(float));
            continue;
        }
        if (w->scales_kind == SCALES_HALF) {
            for (int64_t i = 0; i < count; i += VL) STORE(out + i, halves((const uint16_t *)from + i));
            continue;
        }
        if ((first_group + g) * w->group_size / 256 != stretch) {
            stretch = (first_group + g) * w->group_size / 256;
            const uint16_t *own = supers + stretch * super_stride + first;
            if (count % VL) own = memcpy(super_rest, own, count * sizeof(uint16_t));
            for (int64_t i = 0; i < count; i += VL) STORE(super_line + i, halves(own + i));
        }
        for (int64_t i = 0; i < count; i += VL) STORE(out + i, MUL(bytes((const int8_t *)from + i), LOAD(super_line + i)));
    }
}

/* Rows `first` on, with all that decoding needs: their scales and minima of the groups from `first_group` on. */
typedef struct {
    const uint8_t *packed;
    int64_t packed_stride, group_size, group_shift, first_group;
    const float *scales, *minimum, *book;
} Rows;

static Rows rows_of(
    const Weight *w, int64_t first, int64_t count, int64_t first_column, int64_t last_column, const float *book, float *room) {
    int64_t first_group = first_column / w->group_size;
    int64_t groups = (last_column + w->group_size - 1) / w->group_size - first_group;
    Rows rows = {
        w->packed + first * w->packed_stride, w->packed_stride, w->group_size, __builtin_ctzll((uint64_t)w->group_size),
        first_group, room, room + BLOCK_ROWS * groups, book};
    floats_of(w, w->scales, w->scales_stride, w->super_scales, w->super_scales_stride, first, count, first_group, groups, room);
    if (w->minimum)
        floats_of
        (w, w->minimum, w->minimum_stride, w->super_minimum, w->super_minimum_stride, first, count, first_group, groups,
         room + BLOCK_ROWS * groups);
    return rows;
}

INLINE Group group_at(const int mode, const Rows * rows, int64_t row, int64_t column) {
    int64_t at = ((column >> rows->group_shift) - rows->first_group) * BLOCK_ROWS + row;
    int affine = mode == AFFINE_4 || mode == AFFINE_8;
    return group_of(mode, rows->book, rows->scales[at], affine ? rows->minimum[at] : 0.0f);
}

/* Where the codes of 32 columns begin that have one plane; with 4 bits two runs share their bytes. */
INLINE const uint8_t *codes_at(const int mode, const Rows * rows, int64_t row, int64_t column) {
    const uint8_t *codes = rows->packed + row * rows->packed_stride;
    return mode <= CODEBOOK_4 ? codes + column / 64 * 32 : codes + column;
}

INLINE void decode_run(const int mode, const Rows * rows, int64_t row, int64_t column, float *out) {
    const uint8_t *codes = codes_at(mode, rows, row, column);
    V values[16 / VL];
    Group group = group_at(mode, rows, row, column);
    for (int half = 0; half < 2; half++) {
        if (half && rows->group_size == 16) group = group_at(mode, rows, row, column + 16);
        decode16(values, codes + 16 * half, mode, (int)(column / 32 & 1), &group);
        for (int i = 0; i < 16 / VL; i++) STORE(out + 16 * half + i * VL, values[i]);
    }
}

/* Columns `first:last` of rows, both multiples of 32 or beyond the end: run after run, `run_step` floats apart. */
INLINE void decode_span_of(
    const int mode, const Rows * rows, int64_t row, int64_t count, int64_t first, int64_t last, float *out,
    int64_t row_step, int64_t run_step) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t column = first; column < last; column += 32)
            decode_run(mode, rows, row + i, column, out + i * row_step + (column - first) / 32 * run_step);
}

static void decode_span(
    int64_t mode, const Rows * rows, int64_t row, int64_t count, int64_t first, int64_t last, float *out,
    int64_t row_step, int64_t run_step) {
#define DECODE_SPAN(mode) decode_span_of(mode, rows, row, count, first, last, out, row_step, run_step)
    switch (mode) {
        case SYMMETRIC_4: DECODE_SPAN(SYMMETRIC_4); break;
        case AFFINE_4: DECODE_SPAN(AFFINE_4); break;
        case CODEBOOK_4: DECODE_SPAN(CODEBOOK_4); break;
        case SYMMETRIC_8: DECODE_SPAN(SYMMETRIC_8); break;
        default: DECODE_SPAN(AFFINE_8);
    }
#undef DECODE_SPAN
}

/* Weights of 16 columns of a chunk of 64, by quarters: with 4 bits the last two lie in the high nibbles of the first. */
#define QUARTER(mode, rows, row, chunk, quarter, values, group) \
    decode16(values, codes_at(mode, rows, row, chunk) + 16 * ((mode) <= CODEBOOK_4 ? (quarter) & 1 : (quarter)), mode, \
             (quarter) >> 1, group)

INLINE void store16(int64_t dtype, void *out, int64_t at, const V *values) {
    for (int i = 0; i < 16 / VL; i++) {
        if (dtype == FLOAT32) STORE((float *)out + at + i * VL, values[i]);
        else if (dtype == BFLOAT16) store_bfloats((uint16_t *)out + at + i * VL, values[i]);
        else store_halves((uint16_t *)out + at + i * VL, values[i]);
    }
}

/* A row to the output's dtype. */
INLINE void decode_row(
    const int mode, const int per, const Rows *rows, int64_t row, int64_t columns, int64_t dtype, void *out, int64_t at) {
    for (int64_t chunk = 0; chunk < columns; chunk += 64)
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; quarter++) {
            int64_t column = chunk + 16 * quarter, width = columns - column;
            if (width <= 0) break;
            V values[16 / VL];
            Group group = group_at(mode, rows, row, chunk + quarter * per / 4 * (64 / per));
            QUARTER(mode, rows, row, chunk, quarter, values, &group);
            if (width >= 16) {
                store16(dtype, out, at + column, values);
            } else {
                float rest[16];
                int64_t size = dtype == FLOAT32 ? 4 : 2;
                store16(dtype, rest, 0, values);
                memcpy((char *)out + size * (at + column), rest, size * width);
            }
        }
}

/* A block of rows to the output's dtype: DECODE's unit of work. */
static void decode_block(const Job *job, const Weight *w, int64_t first, int64_t count, float *room) {
    float book[16];
    Rows rows = rows_of(w, first, count, 0, job->columns, table_of(w, book), room);
    for (int64_t row = 0; row < count; row++) {
        int64_t at = (first + row) * w->operand_stride;
#define DECODE_ROW(mode, per) decode_row(mode, per, &rows, row, job->columns, job->dtype, w->operand, at)
        BY_FORM(w, DECODE_ROW)
    }
}
