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
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    atomic_uint generation; /* counts jobs */
    int open, stop;
    atomic_int active; /* workers inside the job; changed under the lock */
    int threads; /* the caller and its workers */
    job job;
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
        atomic_init(&pool->active, 0);
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
    /* The forking thread may itself be inside fq_pool_run, in a task that forks: it goes on
     * from `next` and must not wait for workers that are not there. Or inside fq_pool_work:
     * then nobody is left to send it another job. */
    init_locks(pool);
    pool->open = 0;
    pool->stop = 1;
    atomic_store(&pool->active, 0);
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
    pthread_mutex_lock(&pool->lock);
    const job j = {fn, args, n, grain, (n + grain - 1) / grain};
    pool->job = j;
    for (int i = 0; i < pool->threads; i++) {
        atomic_store_explicit(&pool->shares[i].next, share_begin(pool, &j, i), memory_order_relaxed);
    }
    pool->open = 1;
    atomic_fetch_add(&pool->generation, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);

    run_ranges(pool, &j, 0);

    pthread_mutex_lock(&pool->lock);
    pool->open = 0; /* a worker that comes only now stays out */
    pthread_mutex_unlock(&pool->lock);
    /* what is left is at most one range per worker */
    for (int i = 0; i < SPIN && atomic_load(&pool->active) > 0; i++) {
        spin_pause();
    }
    if (atomic_load(&pool->active) > 0) {
        pthread_mutex_lock(&pool->lock);
        while (atomic_load(&pool->active) > 0) {
            pthread_cond_wait(&pool->idle, &pool->lock);
        }
        pthread_mutex_unlock(&pool->lock);
    }
    pthread_mutex_unlock(&pool->running);
    fq_fpenv_leave(env);
}

void fq_pool_work(fq_pool *pool, int thread) {
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPIN && atomic_load_explicit(&pool->generation, memory_order_relaxed) == seen; i++) {
            spin_pause();
        }
        pthread_mutex_lock(&pool->lock);
        while (!pool->stop && atomic_load(&pool->generation) == seen) {
            pthread_cond_wait(&pool->wake, &pool->lock);
        }
        if (pool->stop) {
            pthread_mutex_unlock(&pool->lock);
            return;
        }
        seen = atomic_load(&pool->generation);
        if (!pool->open) {
            /* too late for this job; the next one is likely soon */
            pthread_mutex_unlock(&pool->lock);
            continue;
        }
        atomic_fetch_add(&pool->active, 1);
        const job j = pool->job;
        pthread_mutex_unlock(&pool->lock);

        fq_fpenv env = fq_fpenv_enter();
        run_ranges(pool, &j, thread);
        fq_fpenv_leave(env);

        pthread_mutex_lock(&pool->lock);
        if (atomic_fetch_sub(&pool->active, 1) == 1) {
            pthread_cond_signal(&pool->idle);
        }
        pthread_mutex_unlock(&pool->lock);
    }
}

void fq_pool_stop(fq_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->stop = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}
