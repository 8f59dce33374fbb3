/* A pool of persistent threads that hands out row ranges of one job at a time.
 *
 * Contract. fq_pool_run calls fn(args, begin, end) for disjoint ranges that cover
 * [0, n), each at most `grain` rows (more where n is beyond 2^15 of them), on the caller and on the pool's workers, and returns
 * when all of them have returned. Which thread gets which range is not fixed, so fn's
 * result for a row must depend on nothing but the row. A pool that is busy (another
 * thread's job, or a job that runs a job) makes the caller do the whole job alone.
 * fn runs in the default floating-point environment.
 *
 * The workers are threads of the caller's making, each inside fq_pool_work. */
#ifndef FQ_EXECUTOR_H
#define FQ_EXECUTOR_H

#include "common.h"

typedef void (*fq_task_fn)(void *args, int64_t begin, int64_t end);
typedef struct fq_pool fq_pool;

fq_pool *fq_pool_new(int threads); /* the caller included; NULL when memory is short */
void fq_pool_free(fq_pool *pool); /* no worker may be inside */
int fq_pool_threads(const fq_pool *pool);
/* pool may be NULL: the caller alone. */
void fq_pool_run(fq_pool *pool, fq_task_fn fn, void *args, int64_t n, int64_t grain);
/* A worker's life: returns after fq_pool_stop, and at once where threads - 1 others are there. */
void fq_pool_work(fq_pool *pool);
void fq_pool_stop(fq_pool *pool);
/* In a forked child, where locks may be held by nobody and no worker exists but the one that
 * forked, in a task; that one returns at the end of its job. */
void fq_pool_after_fork(fq_pool *pool);

#endif
