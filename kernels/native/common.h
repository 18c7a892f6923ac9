/* What all instruction sets share: sizes of blocks, and how work is cut into them. */
#ifndef MEBP_COMMON_H
#define MEBP_COMMON_H

#include "job.h"

#include <math.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define BLOCK_ROWS 48    /* rows of a weight that are decoded together: whole tiles of every instruction set */
#define BLOCK_TOKENS 256 /* tokens that one decoded block serves */
#define DEPTH 128        /* terms of a sum in registers */
#define FEW_TOKENS_DX 8  /* the same for dX */
#define FEW_TOKENS 8     /* up to so many, codes are multiplied as they are decoded */

/* The most groups that decoding may read: a run of 32 columns is decoded whole, and has two groups of 16. */
INLINE int64_t job_groups(const Job *job) { return (job->columns + 31) / 32 * 2; }

/* The 16 values of codes of 4 bits before they are scaled. */
INLINE const float *table_of(const Weight *w, float *book) {
    for (int i = 0; i < 16; i++)
        book[i] = w->mode == CODEBOOK_4 ? w->codebook[i] : w->mode == SYMMETRIC_4 ? (float)(i - 8) : (float)i;
    return book;
}

/* The most tokens that are multiplied with a decoded block, in whole tiles. */
INLINE int64_t tokens_of_block(const Job *job) {
    return job->m < BLOCK_TOKENS ? (job->m + 31) / 32 * 32 : BLOCK_TOKENS;
}

/* Floats of scratch memory that a thread has for itself. */
INLINE int64_t room_of(const Job *job) {
    int64_t scales = 2 * BLOCK_ROWS * job_groups(job);
    int64_t products = job->operation == MULTIPLY && job->m <= FEW_TOKENS ? 0 : BLOCK_ROWS * (tokens_of_block(job) + DEPTH);
    int64_t dx = 64 * DEPTH + 12 * 32 + 2 * BLOCK_ROWS * (64 / 16 + 1) + 64 * BLOCK_ROWS;
    if (job->operation == DECODE) return scales;
    return job->operation == MULTIPLY ? products + scales : dx;
}

INLINE float *own_room(const Job *job, float *after) {
#ifdef _OPENMP
    return after + omp_get_thread_num() * room_of(job);
#else
    (void)job;
    return after;
#endif
}

/* Rows of a block: fewer where there would not be two blocks for each thread. */
INLINE int64_t rows_of_block(const Job *job) {
    int64_t all = 0, rows = BLOCK_ROWS;
    for (int64_t i = 0; i < job->count; i++) all += job->weights[i].rows;
    while (rows > BLOCK_ROWS / 4 && all < 2 * job->threads * rows) rows /= 2;
    return rows;
}

/* Weights in blocks of `rows` rows: their number, or with `block` the weight and the first row of one of them. */
INLINE int64_t blocks_of(const Job *job, int64_t rows, int64_t block, const Weight **weight) {
    int64_t before = 0;
    for (int64_t i = 0; i < job->count; i++) {
        int64_t blocks = (job->weights[i].rows + rows - 1) / rows;
        if (weight && block < before + blocks) {
            *weight = &job->weights[i];
            return (block - before) * rows;
        }
        before += blocks;
    }
    return before;
}

/* The statement CALL(mode, per) for a weight's form, where a chunk of 64 columns has at most `per` groups. */
#define BY_FORM(w, CALL) \
    switch ((w)->mode * 2 + ((w)->group_size < 64)) { \
        case SYMMETRIC_4 * 2: CALL(SYMMETRIC_4, 1); break; \
        case SYMMETRIC_4 * 2 + 1: CALL(SYMMETRIC_4, 2); break; \
        case AFFINE_4 * 2: CALL(AFFINE_4, 1); break; \
        case AFFINE_4 * 2 + 1: CALL(AFFINE_4, 2); break; \
        case CODEBOOK_4 * 2: CALL(CODEBOOK_4, 1); break; \
        case CODEBOOK_4 * 2 + 1: CALL(CODEBOOK_4, 2); break; \
        case SYMMETRIC_8 * 2: \
        case SYMMETRIC_8 * 2 + 1: CALL(SYMMETRIC_8, 4); break; \
        default: CALL(AFFINE_8, 4); \
    }

#if defined(__clang__)
#define PRAGMA(text) _Pragma(#text)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define PRAGMA(text) _Pragma(#text)
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#endif
