#include "executor.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

/* How long a worker looks for the next job before it sleeps: a graph's kernels follow one
 * another within microseconds, and waking a sleeper costs more than that. */
#define SPIN 2000

struct fq_pool {
    pthread_mutex_t running; /* held by the caller whose job it is */
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    atomic_uint generation; /* counts jobs */
    int open, active, stop;
    fq_task_fn fn;
    void *args;
    int64_t n, grain;
    atomic_llong next;
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

fq_pool *fq_pool_new(void) {
    fq_pool *pool = calloc(1, sizeof *pool);
    if (pool) {
        init_locks(pool);
        atomic_init(&pool->generation, 0);
        atomic_init(&pool->next, 0);
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
     * from `next` and must not wait for workers that are not there. */
    init_locks(pool);
    pool->open = pool->active = 0;
}

static void run_ranges(fq_pool *pool, fq_task_fn fn, void *args, int64_t n, int64_t grain) {
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&pool->next, grain, memory_order_relaxed);
        if (begin >= n) {
            return;
        }
        fn(args, begin, n - begin < grain ? n : begin + grain);
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
    pool->fn = fn;
    pool->args = args;
    pool->n = n;
    pool->grain = grain;
    atomic_store(&pool->next, 0);
    pool->open = 1;
    atomic_fetch_add(&pool->generation, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);

    run_ranges(pool, fn, args, n, grain);

    pthread_mutex_lock(&pool->lock);
    pool->open = 0; /* a worker that wakes only now stays out */
    while (pool->active > 0) {
        pthread_cond_wait(&pool->idle, &pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    pthread_mutex_unlock(&pool->running);
    fq_fpenv_leave(env);
}

void fq_pool_work(fq_pool *pool) {
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPIN && atomic_load_explicit(&pool->generation, memory_order_relaxed) == seen; i++) {
            spin_pause();
        }
        pthread_mutex_lock(&pool->lock);
        while (!pool->stop && (!pool->open || atomic_load(&pool->generation) == seen)) {
            pthread_cond_wait(&pool->wake, &pool->lock);
        }
        if (pool->stop) {
            pthread_mutex_unlock(&pool->lock);
            return;
        }
        seen = atomic_load(&pool->generation);
        pool->active++;
        fq_task_fn fn = pool->fn;
        void *args = pool->args;
        int64_t n = pool->n, grain = pool->grain;
        pthread_mutex_unlock(&pool->lock);

        fq_fpenv env = fq_fpenv_enter();
        run_ranges(pool, fn, args, n, grain);
        fq_fpenv_leave(env);

        pthread_mutex_lock(&pool->lock);
        if (--pool->active == 0) {
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
