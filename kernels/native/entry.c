/* What Python calls: the choice of the instruction set, and the one parallel region that a job takes. */
#include "common.h"

#include <time.h>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

void work_avx512(const Job *job);
void work_avx2(const Job *job);
void work_neon(const Job *job);

void rows_avx512(const RowJob *job);
void rows_avx2(const RowJob *job);
void rows_neon(const RowJob *job);

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

#ifdef _OPENMP
#define WAIT 2000000          /* nanoseconds that no job waits for its threads where processors are free */
#define NOT_CROWDED 200000000 /* nanoseconds after which other threads are tried again */

/* The most multiplications in a microsecond so far, by operation and tokens: each of a few, and from a power of two to the
   next. Decoding costs the same for one token as for many, so that jobs of other sizes are no measure of each other. */
static _Atomic int64_t best_rates[3][FEW_TOKENS + 64];
static _Atomic int64_t crowded_until;

static _Atomic int64_t *best_rate_of(const Job *job) {
    int64_t m = job->operation == DECODE ? 0 : job->m;
    return &best_rates[job->operation][m <= FEW_TOKENS ? m : FEW_TOKENS + 63 - __builtin_clzll((uint64_t)m)];
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

/* Shares a job among the threads of OpenMP. They wait for each other at its end, and beside other busy processes one may
   have to wait for its processor for many times what a small job takes. After that has happened, small jobs stay in one
   thread for a while. */
static void share(void (*work)(const Job *), const Job *job) {
    _Atomic int64_t *best_rate = best_rate_of(job);
    int64_t rows = 0, start = nanoseconds();
    for (int64_t i = 0; i < job->count; i++) rows += job->weights[i].rows;
    int64_t products = (job->operation == DECODE ? 1 : job->m) * rows * job->columns, rate = *best_rate;
    int64_t usual = rate ? products * 1000 / rate : 0;
    if (rate && start < crowded_until && usual * job->threads < 5 * WAIT) {
        work(job);
        return;
    }
#pragma omp parallel num_threads((int)job->threads)
    work(job);
    int64_t end = nanoseconds(), took = end - start + 1;
    if (rate && took > 3 * usual + WAIT) crowded_until = end + NOT_CROWDED;
    if (products * 1000 / took > rate) *best_rate = products * 1000 / took;
}
#endif

/* The function `name` of an instruction set; 0 for one not compiled in. */
#if defined(__x86_64__)
#define CHOSEN(name, set) ((set) == AVX512 ? name##_avx512 : (set) == AVX2 ? name##_avx2 : 0)
#elif defined(__aarch64__)
#define CHOSEN(name, set) ((set) == NEON ? name##_neon : 0)
#else
#define CHOSEN(name, set) 0
#endif

/* Does a job by an instruction set that `mebp_best` gave, or a lesser one. Returns 0, or -1 for one not compiled in. */
int64_t mebp_run(const Job *job, int64_t instructions) {
    void (*work)(const Job *) = CHOSEN(work, instructions);
    if (!work) return -1;
#ifdef _OPENMP
    if (job->threads > 1) {
        share(work, job);
        return 0;
    }
#endif
    work(job);
    return 0;
}

/* Does a small operation, in one thread beside busy processes; see `mebp_run`. */
int64_t mebp_rows(const RowJob *job, int64_t instructions) {
    void (*work)(const RowJob *) = CHOSEN(rows, instructions);
    if (!work) return -1;
#ifdef _OPENMP
    if (job->threads > 1 && nanoseconds() >= crowded_until) {
#pragma omp parallel num_threads((int)job->threads)
        work(job);
        return 0;
    }
#endif
    work(job);
    return 0;
}

/* Whether this processor has instructions that multiply bfloat16 numbers, which torch's products use. */
int64_t mebp_multiplies_bfloat16(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
#elif defined(__aarch64__) && defined(__linux__)
    return (getauxval(AT_HWCAP2) >> 14 & 1) != 0; /* HWCAP2_BF16 */
#else
    return 0;
#endif
}
