// llama.cpp without Python around it: a worker that is told what to evaluate, the work of
// llama-perplexity, and the shortest program that continues a prompt.
//
//   llama_peer version
//   llama_peer serve MODEL THREADS N_CTX REPACK
//   llama_peer perplexity MODEL TEXT N_CTX CHUNKS THREADS
//   llama_peer run MODEL PROMPT N THREADS REPACK
//
// All settings are the library's defaults but for those named here. REPACK 0 keeps it from
// copying weights into layouts of its own (llama-cli --no-repack).

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ggml.h"
#include "llama.h"

enum { N_BATCH = 2048, MAX_LINE = 1 << 16, MAX_SCORERS = 64 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("llama_peer: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static void on_log(enum ggml_log_level level, const char *text, void *user) {
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static struct llama_model *load(const char *path, int repack) {
    llama_log_set(on_log, NULL);
    llama_backend_init();
    struct llama_model_params params = llama_model_default_params();
    params.use_extra_bufts = repack;
    struct llama_model *model = llama_model_load_from_file(path, params);
    if (!model) die("cannot load %s", path);
    return model;
}

static struct llama_context *context(struct llama_model *model, int n_ctx, int n_batch, int n_seq, int threads) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = n_ctx;
    params.n_batch = n_batch;
    if ((int)params.n_ubatch > n_batch) params.n_ubatch = n_batch;
    params.n_seq_max = n_seq;
    params.n_threads = params.n_threads_batch = threads;
    struct llama_context *ctx = llama_init_from_model(model, params);
    if (!ctx) die("cannot make a context of %d tokens", n_ctx);
    return ctx;
}

// Tokens of a text, with what the vocabulary puts around it; the caller frees them.
static llama_token *tokenize(const struct llama_model *model, const char *text, size_t length, int *n) {
    llama_token *tokens = malloc((length + 8) * sizeof *tokens);
    *n = llama_tokenize(llama_model_get_vocab(model), text, length, tokens, length + 8, true, false);
    if (*n < 1) die("cannot tokenize the text");
    return tokens;
}

static void decode(struct llama_context *ctx, struct llama_batch batch) {
    int status = llama_decode(ctx, batch);
    if (status) die("llama_decode: %d", status);
    llama_synchronize(ctx);
}

// ---------------------------------------------------------------- serve

// Each line of stdin, "prompt ID..." or "decode K ID...", is answered by one of seconds: of
// evaluating all ids together, or of each id after the first K, which are evaluated together.
static int serve(const char *path, int threads, int n_ctx, int repack) {
    struct llama_model *model = load(path, repack);
    struct llama_context *ctx = context(model, n_ctx, N_BATCH, 1, threads);
    printf("ok %d\n", llama_vocab_n_tokens(llama_model_get_vocab(model)));
    fflush(stdout);
    static char line[MAX_LINE];
    llama_token *ids = malloc(n_ctx * sizeof *ids);
    while (fgets(line, sizeof line, stdin)) {
        char *word = strtok(line, " \n");
        if (!word || (strcmp(word, "prompt") && strcmp(word, "decode"))) die("unknown command");
        int n_first = -1, n = 0;
        if (!strcmp(word, "decode")) n_first = atoi(strtok(NULL, " \n"));
        for (char *id; (id = strtok(NULL, " \n"));) {
            if (n == n_ctx) die("more than %d tokens", n_ctx);
            ids[n++] = atoi(id);
        }
        if (n_first < 0) n_first = n;
        llama_memory_clear(llama_get_memory(ctx), false);
        double begin = now();
        decode(ctx, llama_batch_get_one(ids, n_first));
        printf("ok");
        if (n_first == n) printf(" %.9f", now() - begin);
        for (int i = n_first; i < n; i++) {
            begin = now();
            decode(ctx, llama_batch_get_one(ids + i, 1));
            printf(" %.9f", now() - begin);
        }
        printf("\n");
        fflush(stdout);
    }
    return 0;
}

// ---------------------------------------------------------------- perplexity

// Rows of logits that one thread scores: row i predicts next[i].
struct scoring {
    const float *logits;
    const llama_token *next;
    int n_vocab, begin, end;
    double nll;
};

static void *score(void *arg) {
    struct scoring *s = arg;
    for (int i = s->begin; i < s->end; i++) {
        const float *row = s->logits + (size_t)i * s->n_vocab;
        float max = row[0];
        for (int j = 1; j < s->n_vocab; j++) max = row[j] > max ? row[j] : max;
        double sum = 0;
        for (int j = 0; j < s->n_vocab; j++) sum += expf(row[j] - max);
        s->nll += log(sum) - (row[s->next[i]] - max);
    }
    return NULL;
}

static double score_all(const float *logits, const llama_token *next, int rows, int n_vocab, int threads) {
    struct scoring parts[MAX_SCORERS];
    pthread_t ids[MAX_SCORERS];
    double nll = 0;
    for (int t = 0; t < threads; t++) {
        parts[t] = (struct scoring){logits, next, n_vocab, rows * t / threads, rows * (t + 1) / threads, 0};
        if (t && pthread_create(&ids[t], NULL, score, &parts[t])) die("cannot start a thread");
    }
    score(&parts[0]);
    for (int t = 0; t < threads; t++) {
        if (t) pthread_join(ids[t], NULL);
        nll += parts[t].nll;
    }
    return nll;
}

static char *read_file(const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    if (!file) die("cannot read %s", path);
    fseek(file, 0, SEEK_END);
    *length = ftell(file);
    rewind(file);
    char *text = malloc(*length + 1);
    if (fread(text, 1, *length, file) != *length) die("cannot read %s", path);
    fclose(file);
    return text;
}

// As llama-perplexity: the whole text is tokenized, as many chunks as fit the batch are evaluated
// at once as sequences of their own, logits are kept of each chunk's second half.
static int perplexity(const char *path, const char *text_path, int n_ctx, int chunks, int threads) {
    double start = now();
    if (threads > MAX_SCORERS || n_ctx > N_BATCH) die("too many threads, or too long a chunk");
    struct llama_model *model = load(path, 1);
    const struct llama_vocab *vocab = llama_model_get_vocab(model);
    int n_seq = N_BATCH / n_ctx, n_vocab = llama_vocab_n_tokens(vocab), first = n_ctx / 2, n;
    struct llama_context *ctx = context(model, n_seq * n_ctx, n_seq * n_ctx, n_seq, threads);
    double loaded = now();
    size_t length;
    char *text = read_file(text_path, &length);
    llama_token *tokens = tokenize(model, text, length, &n);
    if (chunks < 1 || n / n_ctx < chunks) die("the text has %d chunks, not %d", n / n_ctx, chunks);
    double tokenized = now(), scoring = 0, nll = 0;
    struct llama_batch batch = llama_batch_init(n_seq * n_ctx, 0, 1);
    for (int chunk = 0; chunk < chunks; chunk += n_seq) {
        int together = chunks - chunk < n_seq ? chunks - chunk : n_seq;
        batch.n_tokens = together * n_ctx;
        for (int i = 0; i < batch.n_tokens; i++) {
            int pos = i % n_ctx;
            batch.token[i] = tokens[chunk * n_ctx + i];
            if (!pos && llama_vocab_get_add_bos(vocab)) batch.token[i] = llama_vocab_bos(vocab);
            batch.pos[i] = pos;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = i / n_ctx;
            batch.logits[i] = pos >= first;
        }
        llama_memory_clear(llama_get_memory(ctx), true);
        decode(ctx, batch);
        double begin = now();
        for (int s = 0; s < together; s++) {
            const llama_token *next = tokens + (chunk + s) * n_ctx + first + 1;
            const float *logits = llama_get_logits_ith(ctx, s * n_ctx + first);
            nll += score_all(logits, next, n_ctx - 1 - first, n_vocab, threads);
        }
        scoring += now() - begin;
    }
    printf("{\"ppl\": %.6f, \"load_s\": %.3f, \"tokenize_s\": %.3f, \"eval_s\": %.3f, \"score_s\": %.3f}\n",
           exp(nll / (chunks * (n_ctx - 1 - first))), loaded - start, tokenized - loaded,
           now() - tokenized - scoring, scoring);
    return 0;
}

// ---------------------------------------------------------------- run

static void print_ids(const char *name, const llama_token *ids, int n, const char *end) {
    printf("\"%s\": [", name);
    for (int i = 0; i < n; i++) printf("%s%d", i ? ", " : "", ids[i]);
    printf("]%s", end);
}

static int run(const char *path, const char *prompt, int n_predict, int threads, int repack) {
    struct llama_model *model = load(path, repack);
    const struct llama_vocab *vocab = llama_model_get_vocab(model);
    int n_prompt, n_vocab = llama_vocab_n_tokens(vocab);
    llama_token *tokens = tokenize(model, prompt, strlen(prompt), &n_prompt);
    tokens = realloc(tokens, (n_prompt + n_predict) * sizeof *tokens);
    // no longer a context and no larger a batch than needed: the least memory and time
    struct llama_context *ctx = context(model, n_prompt + n_predict, n_prompt, 1, threads);
    llama_token *next = tokens + n_prompt;
    for (int i = 0; i < n_predict; i++) {
        decode(ctx, i ? llama_batch_get_one(next + i - 1, 1) : llama_batch_get_one(tokens, n_prompt));
        const float *logits = llama_get_logits_ith(ctx, -1);
        int best = 0;
        for (int j = 1; j < n_vocab; j++) best = logits[j] > logits[best] ? j : best;
        next[i] = best;
        char piece[256];
        int length = llama_token_to_piece(vocab, best, piece, sizeof piece, 0, true);
        fwrite(piece, 1, length > 0 ? length : 0, stdout);
    }
    printf("\n{");
    print_ids("prompt_tokens", tokens, n_prompt, ", ");
    print_ids("generated_tokens", next, n_predict, "}\n");
    return 0;  // nothing is freed: the process ends sooner
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "";
    if (!strcmp(mode, "version") && argc == 2) {
        printf("ggml %s; %s\n", ggml_version(), llama_print_system_info());
        return 0;
    }
    if (!strcmp(mode, "serve") && argc == 6) return serve(argv[2], atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
    if (!strcmp(mode, "perplexity") && argc == 7)
        return perplexity(argv[2], argv[3], atoi(argv[4]), atoi(argv[5]), atoi(argv[6]));
    if (!strcmp(mode, "run") && argc == 7)
        return run(argv[2], argv[3], atoi(argv[4]), atoi(argv[5]), atoi(argv[6]));
    die("unknown arguments");
}
