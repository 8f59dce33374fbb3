#define _GNU_SOURCE
#include "executor.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

/* How long a worker looks for the next job, and a caller for the end of one, before it
 * sleeps: a graph's kernels follow one another within microseconds, and waking a sleeper
 * costs tens of them. In the later part the processor is offered to whoever needs it; not
 * before, since who takes it keeps it for milliseconds. */
#define SPIN_NS 200000
#define SPIN_ALONE_NS 50000

/* A range's number within a share must fit the claim word. */
#define MAX_RANGES 32768

/* What passes from one core to another moves by cache lines, a few hundred nanoseconds each,
 * and that is what a small job's sharing costs. So a job is one line, a thread's claims and
 * its answer are one line, and neither is written by more threads than it must be.
 *
 * `state` is twice the job's generation, and odd while the job is being written: a worker
 * that reads the same even number before and after has read one job.
 *
 * A range belongs to whoever advances the claim word of its share, which holds a generation
 * and a count: of an older generation, nobody has taken any; of a newer one, the reader's
 * job is over. A job ends when all its ranges have been claimed and worked off, so a late
 * worker finds nothing to claim in it. */
typedef struct {
    _Alignas(64) atomic_ullong state;
    _Atomic(fq_task_fn) fn;
    _Atomic(void *) args;
    atomic_llong n, grain, ranges;
} job_line;

typedef struct {
    _Alignas(64) atomic_ullong claim; /* generation << 16 | ranges of the share that are taken */
    atomic_ullong done;               /* generation << 16 | ranges that the thread has worked off */
} share;

typedef struct {
    fq_task_fn fn;
    void *args;
    int64_t n, grain, ranges;
    uint64_t generation;
} job;

struct fq_pool {
    job_line job;
    _Alignas(64) pthread_mutex_t running; /* held by the caller whose job it is */
    uint64_t generation;                  /* of the last job; the caller's */
    int threads;                          /* the caller and its workers */
    atomic_int entered;                   /* workers so far */
    /* sleeping, for workers and for the caller */
    _Alignas(64) pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    _Alignas(64) atomic_int sleepers, caller_sleeps, stop, forked;
    share shares[];
};

static inline void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Takes the line back from a reader ahead of the next write to it. */
static inline void own_line(share *s) {
#if defined(__x86_64__)
    __asm__ __volatile__("prefetchw %0" : : "m"(*s));
#else
    (void)s;
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

typedef struct {
    int64_t steps, begin;
} spinner;

/* One step of waiting; 0 when it has lasted long enough. */
static inline int spin(spinner *s) {
    spin_pause();
    if (++s->steps % 64 != 0) {
        return 1;
    }
    const int64_t now = now_ns();
    if (s->begin == 0) {
        s->begin = now;
    }
    if (now - s->begin > SPIN_ALONE_NS) {
        sched_yield();
    }
    return now - s->begin < SPIN_NS;
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
        atomic_init(&pool->job.state, 0);
        atomic_init(&pool->entered, 0);
        atomic_init(&pool->sleepers, 0);
        atomic_init(&pool->caller_sleeps, 0);
        atomic_init(&pool->stop, 0);
        atomic_init(&pool->forked, 0);
        for (int i = 0; i < threads; i++) {
            atomic_init(&pool->shares[i].claim, 0);
            atomic_init(&pool->shares[i].done, 0);
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
    atomic_store(&pool->forked, 1);
    atomic_store(&pool->sleepers, 0);
    atomic_store(&pool->caller_sleeps, 0);
}

static uint64_t count_of(uint64_t word, uint64_t generation) {
    return word >> 16 == generation ? word & 0xffff : 0;
}

int fq_pool_threads(const fq_pool *pool) { return pool->threads; }

static inline int64_t share_begin(const fq_pool *pool, const job *j, int s) {
    return j->ranges * s / pool->threads;
}

/* Whether ranges are for any thread to take. With no more ranges than threads each worker
 * keeps to its own: the others' rows are in other caches. The caller takes what is left. */
static inline int stealing(const fq_pool *pool, const job *j) { return j->ranges > pool->threads; }

/* The number of a range of share s that is now the thread's own, or -1. */
static int64_t take(fq_pool *pool, const job *j, int s) {
    const int64_t begin = share_begin(pool, j, s);
    const uint64_t ranges = (uint64_t)(share_begin(pool, j, s + 1) - begin);
    unsigned long long word = atomic_load_explicit(&pool->shares[s].claim, memory_order_relaxed);
    for (;;) {
        const uint64_t taken = count_of(word, j->generation);
        if (word >> 16 > j->generation || taken >= ranges) {
            return -1;
        }
        if (atomic_compare_exchange_weak(&pool->shares[s].claim, &word, j->generation << 16 | (taken + 1))) {
            return begin + (int64_t)taken;
        }
    }
}

static inline void work_off(const job *j, int64_t range) {
    const int64_t begin = range * j->grain;
    j->fn(j->args, begin, j->n - begin < j->grain ? j->n : begin + j->grain);
}

/* Each thread begins with the share that it had in the job before, whose rows its cache may
 * still hold, and then helps the others. */
static void run_as_worker(fq_pool *pool, const job *j, int thread) {
    share *own = &pool->shares[thread];
    uint64_t done = 0;
    for (int i = 0; i < (stealing(pool, j) ? pool->threads : 1); i++) {
        int64_t range;
        while ((range = take(pool, j, (thread + i) % pool->threads)) >= 0) {
            work_off(j, range);
            done++;
            atomic_store_explicit(&own->done, j->generation << 16 | done, memory_order_release);
        }
    }
    if (done == 0) {
        return;
    }
    /* the caller says that it sleeps and then looks whether all is done: one sees the other */
    atomic_exchange(&own->done, j->generation << 16 | done);
    if (atomic_load(&pool->caller_sleeps)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_signal(&pool->idle);
        pthread_mutex_unlock(&pool->lock);
    }
}

static void wake_sleepers(fq_pool *pool) {
    if (atomic_load_explicit(&pool->sleepers, memory_order_relaxed) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
}

static int others_are_done(fq_pool *pool, const job *j, int64_t own) {
    int64_t done = own;
    for (int i = 1; i < pool->threads && done < j->ranges; i++) {
        done += (int64_t)count_of(atomic_load(&pool->shares[i].done), j->generation);
    }
    return done == j->ranges || atomic_load_explicit(&pool->forked, memory_order_relaxed);
}

static void run_as_caller(fq_pool *pool, const job *j) {
    int64_t done = 0, range;
    if (!stealing(pool, j)) {
        const int64_t end = share_begin(pool, j, 1);
        for (; done < end; done++) {
            work_off(j, done); /* nobody else takes these */
        }
    }
    for (int s = stealing(pool, j) ? 0 : 1; s < pool->threads; s++) {
        while ((range = take(pool, j, s)) >= 0) {
            /* one that fell asleep just when the job came was not seen then */
            wake_sleepers(pool);
            work_off(j, range);
            done++;
        }
    }
    spinner wait = {0};
    while (!others_are_done(pool, j, done)) {
        if (spin(&wait)) {
            continue;
        }
        pthread_mutex_lock(&pool->lock);
        atomic_store(&pool->caller_sleeps, 1);
        while (!others_are_done(pool, j, done)) {
            pthread_cond_wait(&pool->idle, &pool->lock);
        }
        atomic_store(&pool->caller_sleeps, 0);
        pthread_mutex_unlock(&pool->lock);
    }
}

void fq_pool_run(fq_pool *pool, fq_task_fn fn, void *args, int64_t n, int64_t grain) {
    if (n <= 0) {
        return;
    }
    if (grain < 1) {
        grain = 1;
    }
    if (n / MAX_RANGES >= grain) {
        grain = n / MAX_RANGES + 1;
    }
    fq_fpenv env = fq_fpenv_enter();
    if (!pool || n <= grain || pthread_mutex_trylock(&pool->running) != 0) {
        for (int64_t begin = 0; begin < n; begin += grain) {
            fn(args, begin, n - begin < grain ? n : begin + grain);
        }
        fq_fpenv_leave(env);
        return;
    }
    const job j = {fn, args, n, grain, (n - 1) / grain + 1, ++pool->generation};
    job_line *line = &pool->job;
    atomic_store_explicit(&line->state, 2 * j.generation - 1, memory_order_relaxed);
    atomic_store_explicit(&line->fn, fn, memory_order_release);
    atomic_store_explicit(&line->args, args, memory_order_release);
    atomic_store_explicit(&line->n, n, memory_order_release);
    atomic_store_explicit(&line->grain, grain, memory_order_release);
    atomic_store_explicit(&line->ranges, j.ranges, memory_order_release);
    atomic_store_explicit(&line->state, 2 * j.generation, memory_order_release);
    wake_sleepers(pool);
    run_as_caller(pool, &j);
    pthread_mutex_unlock(&pool->running);
    fq_fpenv_leave(env);
}

/* Whether there is a job other than `seen`; if so it is in j. */
static int look(fq_pool *pool, uint64_t seen, job *j) {
    job_line *line = &pool->job;
    const uint64_t state = atomic_load_explicit(&line->state, memory_order_acquire);
    if (state == seen || state % 2) {
        return 0;
    }
    j->fn = atomic_load_explicit(&line->fn, memory_order_acquire);
    j->args = atomic_load_explicit(&line->args, memory_order_acquire);
    j->n = atomic_load_explicit(&line->n, memory_order_acquire);
    j->grain = atomic_load_explicit(&line->grain, memory_order_acquire);
    j->ranges = atomic_load_explicit(&line->ranges, memory_order_acquire);
    j->generation = state / 2;
    return atomic_load_explicit(&line->state, memory_order_relaxed) == state;
}

void fq_pool_work(fq_pool *pool) {
    /* a number of its own whoever started it: two of one number would lose each other's work */
    const int thread = 1 + atomic_fetch_add(&pool->entered, 1);
    if (thread >= pool->threads) {
        return;
    }
    job j = {0};
    uint64_t seen = 0;
    while (!atomic_load(&pool->stop)) {
        spinner wait = {0};
        while (!look(pool, seen, &j)) {
            own_line(&pool->shares[thread]);
            if (atomic_load_explicit(&pool->stop, memory_order_relaxed)) {
                return;
            }
            if (spin(&wait)) {
                continue;
            }
            pthread_mutex_lock(&pool->lock);
            atomic_fetch_add(&pool->sleepers, 1);
            while (!atomic_load(&pool->stop) && atomic_load(&pool->job.state) == seen) {
                pthread_cond_wait(&pool->wake, &pool->lock);
            }
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->lock);
            wait = (spinner){0};
        }
        seen = 2 * j.generation;
        fq_fpenv env = fq_fpenv_enter();
        run_as_worker(pool, &j, thread);
        fq_fpenv_leave(env);
    }
}

void fq_pool_stop(fq_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->stop, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}
