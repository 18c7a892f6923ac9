/* A job by one instruction set, whose vectors the file that includes this one has defined.

   Work is cut into blocks, each of which writes outputs of its own; a thread takes the next block when it has done one.
   So a thread that waits for its processor holds up no more than one block. No sum depends on how blocks are shared. */
#include "decode.h"
#include "products.h"
#include "few.h"

#define SLICE 128 /* columns of X that are packed together */

static void multiply(const Job *job) {
    int64_t step = rows_of_block(job), blocks = blocks_of(job, step, 0, 0), ranks = 0;
    for (int64_t i = 0; i < job->count; i++) ranks += job->weights[i].rank;
    if (job->m <= FEW_TOKENS) {
        float *room = own_room(job, job->scratch);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t block = 0; block < blocks; block++) {
            const Weight *w = job->weights;
            int64_t first = blocks_of(job, step, block, &w);
            multiply_few(job, w, first, w->rows - first < step ? w->rows - first : step, room);
        }
        return;
    }
    int64_t depth = job->columns + ranks, slices = (job->columns + SLICE - 1) / SLICE;
    float *room = own_room(job, job->scratch + tokens_of_block(job) * depth);
    for (int64_t token = 0; token < job->m; token += BLOCK_TOKENS) {
        int64_t tokens = job->m - token < BLOCK_TOKENS ? job->m - token : BLOCK_TOKENS, panels = (tokens + NR - 1) / NR;
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < panels * (slices + 1); piece++) {
            int64_t panel = piece / (slices + 1), slice = piece % (slices + 1), first = slice * SLICE, last = first + SLICE;
            float *to = job->scratch + panel * NR * depth;
            int64_t at = token + panel * NR;
            if (slice < slices) {
                if (last > job->columns) last = job->columns;
                pack_columns(job->operand + at * job->operand_stride, job->operand_stride, job->m - at, first, last,
                                   to + first * NR);
                continue;
            }
            to += job->columns * NR;
            for (int64_t i = 0; i < job->count; i++) {
                const Weight *w = &job->weights[i];
                pack_columns(w->t + at * w->t_stride, w->t_stride, job->m - at, 0, w->rank, to);
                to += w->rank * NR;
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++) {
            const Weight *w = job->weights;
            int64_t first = blocks_of(job, step, block, &w), place = job->columns;
            for (const Weight *before = job->weights; before < w; before++) place += before->rank;
            multiply_block(job, w, token, tokens, first, w->rows - first < step ? w->rows - first : step, depth, place,
                                 job->scratch, room);
        }
    }
}

static void work(const Job *job) {
    if (job->operation == MULTIPLY) {
        multiply(job);
    } else if (job->operation == MULTIPLY_DX) {
        float *room = own_room(job, job->scratch);
        if (job->m <= FEW_TOKENS_DX) {
#pragma omp for schedule(dynamic, 2) nowait
            for (int64_t chunk = 0; chunk < job->columns; chunk += 64) few_dx_block(job, chunk, room); /* 2: a cache line */
            return;
        }
        int64_t width = job->columns >= 8 * 64 * job->threads ? 64 : 32;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t first = 0; first < job->columns; first += width) dx_block(job, first, width, room);
    } else {
        float *room = own_room(job, job->scratch);
        int64_t step = rows_of_block(job), blocks = blocks_of(job, step, 0, 0);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t block = 0; block < blocks; block++) {
            const Weight *w = job->weights;
            int64_t first = blocks_of(job, step, block, &w);
            decode_block(job, w, first, w->rows - first < step ? w->rows - first : step, room);
        }
    }
}
