#include "executor.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

/* How long a worker looks for the next job before it sleeps: a graph's kernels follow one
 * another within microseconds, and waking a sleeper costs more than that. */
#define SPIN 2000

typedef struct {
    fq_task_fn fn;
    void *args;
    int64_t n, grain, ranges;
} job;

/* One thread's share of the ranges, on a cache line of its own. */
typedef struct {
    _Alignas(64) atomic_llong next;
} share;

struct fq_pool {
    pthread_mutex_t running; /* held by the caller whose job it is */
    int threads;             /* the caller and its workers */
    job job;                 /* written while no worker is active */
    atomic_uint generation;  /* counts jobs; 0 is none */
    atomic_uint open;        /* the generation that workers may join, or 0 */
    atomic_int active;       /* workers that have joined, or are about to find out that they may not */
    /* sleeping, for workers and for the caller */
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    atomic_int sleepers, caller_sleeps, stop;
    share shares[];
};

static inline void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void init_locks(fq_pool *pool) {
    pthread_mutex_init(&pool->running, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->idle, NULL);
}

fq_pool *fq_pool_new(int threads) {
    const size_t size = sizeof(fq_pool) + (size_t)threads * sizeof(share);
    fq_pool *pool = aligned_alloc(_Alignof(fq_pool), size);
    if (pool) {
        memset(pool, 0, size);
        init_locks(pool);
        pool->threads = threads;
        atomic_init(&pool->generation, 0);
        atomic_init(&pool->open, 0);
        atomic_init(&pool->active, 0);
        atomic_init(&pool->sleepers, 0);
        atomic_init(&pool->caller_sleeps, 0);
        atomic_init(&pool->stop, 0);
        for (int i = 0; i < threads; i++) {
            atomic_init(&pool->shares[i].next, 0);
        }
    }
    return pool;
}

void fq_pool_free(fq_pool *pool) {
    if (pool) {
        pthread_cond_destroy(&pool->idle);
        pthread_cond_destroy(&pool->wake);
        pthread_mutex_destroy(&pool->lock);
        pthread_mutex_destroy(&pool->running);
        free(pool);
    }
}

void fq_pool_after_fork(fq_pool *pool) {
    /* The forking thread may itself be inside, in a task that forks. A caller goes on with
     * its ranges and must not wait for workers that are not there; a worker, now the only
     * thread, has nobody to wait for and ends. */
    init_locks(pool);
    atomic_store(&pool->stop, 1);
    atomic_store(&pool->open, 0);
    atomic_store(&pool->active, 0);
    atomic_store(&pool->sleepers, 0);
    atomic_store(&pool->caller_sleeps, 0);
}

static inline int64_t share_begin(const fq_pool *pool, const job *j, int share) {
    return j->ranges * share / pool->threads;
}

/* Each thread begins with the share that it had in the job before, whose rows its cache may
 * still hold, and then helps the others. */
static void run_ranges(fq_pool *pool, const job *j, int thread) {
    for (int i = 0; i < pool->threads; i++) {
        const int s = (thread + i) % pool->threads;
        const int64_t end = share_begin(pool, j, s + 1);
        for (;;) {
            const int64_t range = atomic_fetch_add_explicit(&pool->shares[s].next, 1, memory_order_relaxed);
            if (range >= end) {
                break;
            }
            const int64_t begin = range * j->grain;
            j->fn(j->args, begin, j->n - begin < j->grain ? j->n : begin + j->grain);
        }
    }
}

void fq_pool_run(fq_pool *pool, fq_task_fn fn, void *args, int64_t n, int64_t grain) {
    if (n <= 0) {
        return;
    }
    if (grain < 1) {
        grain = 1;
    }
    fq_fpenv env = fq_fpenv_enter();
    if (!pool || n <= grain || pthread_mutex_trylock(&pool->running) != 0) {
        for (int64_t begin = 0; begin < n; begin += grain) {
            fn(args, begin, n - begin < grain ? n : begin + grain);
        }
        fq_fpenv_leave(env);
        return;
    }
    /* No lock on the way of a spinning worker: it counts itself as active and then looks
     * whether the job is open; the caller closes the job and then looks whether anybody is
     * active. Whichever comes second sees the other. Sleeping is entered the same way. */
    const job j = {fn, args, n, grain, (n + grain - 1) / grain};
    pool->job = j;
    for (int i = 0; i < pool->threads; i++) {
        atomic_store_explicit(&pool->shares[i].next, share_begin(pool, &j, i), memory_order_relaxed);
    }
    unsigned generation = atomic_load(&pool->generation) + 1;
    generation += generation == 0;
    atomic_store(&pool->open, generation);
    atomic_store(&pool->generation, generation);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }

    run_ranges(pool, &j, 0);

    atomic_store(&pool->open, 0);
    /* what is left is at most one range per worker */
    for (int i = 0; i < SPIN && atomic_load(&pool->active) > 0; i++) {
        spin_pause();
    }
    if (atomic_load(&pool->active) > 0) {
        pthread_mutex_lock(&pool->lock);
        atomic_store(&pool->caller_sleeps, 1);
        while (atomic_load(&pool->active) > 0) {
            pthread_cond_wait(&pool->idle, &pool->lock);
        }
        atomic_store(&pool->caller_sleeps, 0);
        pthread_mutex_unlock(&pool->lock);
    }
    pthread_mutex_unlock(&pool->running);
    fq_fpenv_leave(env);
}

void fq_pool_work(fq_pool *pool, int thread) {
    unsigned seen = 0;
    while (!atomic_load(&pool->stop)) {
        for (int i = 0; i < SPIN && atomic_load_explicit(&pool->generation, memory_order_relaxed) == seen; i++) {
            spin_pause();
        }
        if (atomic_load(&pool->generation) == seen) {
            pthread_mutex_lock(&pool->lock);
            atomic_fetch_add(&pool->sleepers, 1);
            while (!atomic_load(&pool->stop) && atomic_load(&pool->generation) == seen) {
                pthread_cond_wait(&pool->wake, &pool->lock);
            }
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->lock);
        }
        seen = atomic_load(&pool->generation);
        atomic_fetch_add(&pool->active, 1);
        if (atomic_load(&pool->open)) {
            const job j = pool->job;
            fq_fpenv env = fq_fpenv_enter();
            run_ranges(pool, &j, thread);
            fq_fpenv_leave(env);
        }
        if (atomic_fetch_sub(&pool->active, 1) == 1 && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->idle);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

void fq_pool_stop(fq_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->stop, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}
