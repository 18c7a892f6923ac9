/* What Python calls: the choice of the instruction set, and the one parallel region that a job takes. */
#include "common.h"

void work_avx512(const Job *job);
void work_avx2(const Job *job);
void work_neon(const Job *job);

enum { NONE, NEON, AVX2, AVX512 };

/* The best instruction set that this processor and its system have, of the enumeration above. */
int64_t mebp_best(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return NONE;
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? AVX512 : AVX2;
#elif defined(__aarch64__)
    return NEON;
#else
    return NONE;
#endif
}

/* Floats of scratch memory that a job needs whose weights have `ranks` LoRA columns of t in all. */
int64_t mebp_scratch(int64_t operation, int64_t m, int64_t columns, int64_t ranks, int64_t threads) {
    Job job = {.operation = operation, .m = m, .columns = columns};
    int64_t packed = operation == MULTIPLY && m > FEW_TOKENS ? tokens_of_block(&job) * (columns + ranks) : 0;
    return packed + threads * room_of(&job) + 16;
}

/* Does a job by an instruction set that `mebp_best` gave, or a lesser one. Returns 0, or -1 for one not compiled in. */
int64_t mebp_run(const Job *job, int64_t instructions) {
    void (*work)(const Job *) = 0;
#if defined(__x86_64__)
    work = instructions == AVX512 ? work_avx512 : instructions == AVX2 ? work_avx2 : 0;
#elif defined(__aarch64__)
    work = instructions == NEON ? work_neon : 0;
#endif
    if (!work) return -1;
#ifdef _OPENMP
    if (job->threads > 1) {
#pragma omp parallel num_threads((int)job->threads)
        work(job);
        return 0;
    }
#endif
    work(job);
    return 0;
}

/* Whether a job may be shared among threads. */
int64_t mebp_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
