/* What Python hands over: one array of 64-bit integers, a Job and its weights. `native.py` fills it in this order. */
#ifndef MEBP_JOB_H
#define MEBP_JOB_H

#include <stdint.h>

enum { SCALES_HALF, SCALES_FLOAT, SCALES_TWO_LEVEL };
enum { SYMMETRIC_4, AFFINE_4, CODEBOOK_4, SYMMETRIC_8, AFFINE_8 };
enum { MULTIPLY, MULTIPLY_DX, DECODE };
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* W[rows, columns] as `layout.py` describes it; strides are in elements. */
typedef struct {
    const uint8_t *packed;
    int64_t packed_stride;
    const void *scales; /* [groups, rows]; next to each other along the rows */
    int64_t scales_stride;
    const void *minimum;
    int64_t minimum_stride;
    const uint16_t *super_scales; /* [ceil(columns / 256), rows] */
    int64_t super_scales_stride;
    const uint16_t *super_minimum;
    int64_t super_minimum_stride;
    const float *codebook;
    int64_t scales_kind, mode, group_size, rows;
    float *operand; /* y or dY [M, rows]; of DECODE the output [rows, columns] */
    int64_t operand_stride;
    const float *bias;
    const float *t; /* [M, rank] */
    int64_t t_stride;
    const float *b; /* [rows, rank] */
    int64_t b_stride, rank;
} Weight;

typedef struct {
    int64_t operation;
    float *operand; /* x or dX [M, columns] */
    int64_t operand_stride, m, columns, threads;
    float *scratch; /* as many floats as `scratch_floats` says */
    int64_t accumulate; /* of MULTIPLY_DX: adds to dX */
    const float *g; /* [M, rank] */
    int64_t g_stride;
    const float *a; /* [rank, columns] */
    int64_t a_stride, rank;
    int64_t dtype; /* of DECODE's output */
    int64_t count;
    Weight weights[];
} Job;

enum { NORM, NORM_DX, GATE, GATE_BACKWARD, ROTATE };
enum { SILU, GELU_TANH };

/* A small operation on rows of `columns` numbers; `native_rows.py` fills it. Outputs are contiguous. */
typedef struct {
    int64_t operation, rows, columns, threads;
    int64_t kind; /* of norms whether the factor is 1 + w, of gates the activation, of ROTATE whether it is inverse */
    double eps;
    const float *in[4]; /* x, w, dy; gate, up, dy; q, k, cos, sin */
    int64_t strides[4]; /* of rows */
    float *out[2];
    int64_t tokens, half, heads[2]; /* of ROTATE, whose rows are tokens of all sequences, like these: */
    int64_t head_strides[6]; /* of q and of k: from sequence to sequence, head to head, token to token */
    int64_t table_strides[4]; /* of cos and of sin: from sequence to sequence, token to token */
} RowJob;

#endif
