/* The small operations of a block, row by row: norms, the middle of an MLP, rotary embeddings, and their gradients.

   A thread takes the next piece of rows when it has done one. A row's sums do not depend on how pieces are shared. */

#define PIECE 16384 /* numbers that a thread takes at a time */

/* e^x to about one unit in the last place; x is cut to what float32 holds the result of. NaN stays NaN. */
INLINE float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
    float r = x - n * 0.693145752f - n * 1.42860682e-6f, p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (int32_t)((uint32_t)(bits - 0x4B400000 + 127) << 23);
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* act(x) and its derivative. GELU by tanh is x · sigmoid(z). */
INLINE void activation(const int kind, float x, float *active, float *slope) {
    float z = kind == SILU ? x : x * (1.5957691216f + 0.0713548163f * (x * x)); /* 2 · sqrt(2 / π) and 0.044715 of it */
    float dz = kind == SILU ? 1.0f : 1.5957691216f + 0.2140644488f * (x * x);
    float grown = exp_of(-z), part = 1.0f / (1.0f + grown), share = z < -88.0f ? 0.0f : part;
    *active = x * share;
    float rest = z > 87.0f ? 0.0f : grown * part; /* 1 - share would lose digits */
    *slope = share + *active * rest * dz;
}

/* The sum of x·y·(w + offset), or of x·y without w. */
INLINE float sum_of(const float *x, const float *y, const float *w, float offset, int64_t columns) {
    V sums[2] = {ZERO(), ZERO()};
    int64_t k = 0;
    for (; k + 2 * VL <= columns; k += 2 * VL)
        for (int i = 0; i < 2; i++) {
            V one = LOAD(x + k + i * VL);
            if (w) one = MUL(one, ADD(LOAD(w + k + i * VL), SET1(offset)));
            sums[i] = FMA(one, LOAD(y + k + i * VL), sums[i]);
        }
    float sum = reduce(ADD(sums[0], sums[1]));
    for (; k < columns; k++) sum += x[k] * (w ? w[k] + offset : 1.0f) * y[k];
    return sum;
}

INLINE void norm_row(const RowJob *job, int64_t row) {
    const float *restrict x = job->in[0] + row * job->strides[0], *restrict w = job->in[1];
    float *restrict y = job->out[0] + row * job->columns;
    float offset = job->kind ? 1.0f : 0.0f;
    float factor = 1.0f / sqrtf(sum_of(x, x, 0, 0.0f, job->columns) / job->columns + (float)job->eps);
    if (job->operation == NORM) {
#pragma omp simd
        for (int64_t k = 0; k < job->columns; k++) y[k] = x[k] * factor * (w[k] + offset);
        return;
    }
    const float *restrict dy = job->in[2] + row * job->strides[2];
    float shift = sum_of(dy, x, w, offset, job->columns) * factor / job->columns;
#pragma omp simd
    for (int64_t k = 0; k < job->columns; k++) y[k] = factor * (dy[k] * (w[k] + offset) - x[k] * factor * shift);
}

INLINE void gate_row(const RowJob *job, int64_t row, const int kind) {
    const float *restrict gate = job->in[0] + row * job->strides[0], *restrict up = job->in[1] + row * job->strides[1];
    float *restrict first = job->out[0] + row * job->columns;
    if (job->operation == GATE) {
#pragma omp simd
        for (int64_t k = 0; k < job->columns; k++) {
            float active, slope;
            activation(kind, gate[k], &active, &slope);
            first[k] = active * up[k];
        }
        return;
    }
    const float *restrict dy = job->in[2] + row * job->strides[2];
    float *restrict second = job->out[1] + row * job->columns;
#pragma omp simd
    for (int64_t k = 0; k < job->columns; k++) {
        float active, slope;
        activation(kind, gate[k], &active, &slope);
        first[k] = dy[k] * up[k] * slope;
        second[k] = dy[k] * active;
    }
}

/* All heads of q and of k of one token. */
INLINE void rotate_token(const RowJob *job, int64_t row) {
    int64_t batch = row / job->tokens, token = row % job->tokens, half = job->half, columns = job->columns;
    const float *restrict cosine = job->in[2] + batch * job->table_strides[0] + token * job->table_strides[1];
    const float *restrict sine = job->in[3] + batch * job->table_strides[2] + token * job->table_strides[3];
    for (int i = 0; i < 2; i++)
        for (int64_t head = 0; head < job->heads[i]; head++) {
            const int64_t *strides = job->head_strides + 3 * i;
            const float *restrict x = job->in[i] + batch * strides[0] + head * strides[1] + token * strides[2];
            float *restrict y = job->out[i] + (row * job->heads[i] + head) * columns;
            if (job->kind)
#pragma omp simd
                for (int64_t k = 0; k < half; k++) {
                    y[k] = x[k] * cosine[k] + x[k + half] * sine[k + half];
                    y[k + half] = x[k + half] * cosine[k + half] - x[k] * sine[k];
                }
            else
#pragma omp simd
                for (int64_t k = 0; k < half; k++) {
                    y[k] = x[k] * cosine[k] - x[k + half] * sine[k];
                    y[k + half] = x[k + half] * cosine[k + half] + x[k] * sine[k + half];
                }
#pragma omp simd
            for (int64_t k = 2 * half; k < columns; k++) y[k] = x[k];
        }
}

static void work_rows(const RowJob *job) {
    int64_t width = job->columns * (job->operation == ROTATE ? job->heads[0] + job->heads[1] : 1);
    int64_t step = width < PIECE ? PIECE / width : 1;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t first = 0; first < job->rows; first += step)
        for (int64_t row = first; row < first + step && row < job->rows; row++) {
            if (job->operation <= NORM_DX) norm_row(job, row);
            else if (job->operation == ROTATE) rotate_token(job, row);
            else if (job->kind == SILU) gate_row(job, row, SILU);
            else gate_row(job, row, GELU_TANH);
        }
}
