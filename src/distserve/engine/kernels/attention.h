/* Attention over a paged cache that is read in place: what the step and the layer look like, rotary embedding and cache
 * writes, and how the work is cut into tasks. The arithmetic of a task is in attention_amx.h and attention_plain.h.
 *
 * A task is some query rows of one (sequence, key/value head). A row is one (token, query head of the group). Every row
 * walks the keys in chunks of CHUNK from position 0 with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022)
 * whose reference only moves when a chunk's maximum exceeds it by more than LAZY binary orders: so a row's result does
 * not depend on which other rows share its task, nor on how the prompt was cut into steps.
 */
#pragma once

#include "common.h"

#define CHUNK 128
#define LAZY 8.0f
#define NOTHING -1e29f /* the softmax reference before the first key; masked scores lie another factor of ten below */

typedef struct {
    const int32_t *query_starts, *context_lens, *block_tables;
    const int32_t *positions;
    const int64_t *slots;
    int64_t num_tokens, num_sequences, max_blocks;
} Step;

typedef struct {
    char *kv;                                          /* this layer of block 0 */
    int64_t block_stride, value_offset, head_stride;   /* in elements; tokens are head_dim apart */
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    int64_t window;                                    /* tokens a query sees, 0: all */
    int64_t dtype;
    const float *cosines, *sines;                      /* [max_positions, head_dim / 2] or NULL: no rotation */
    double scale;
} Layer;

typedef struct {
    const Layer *layer;
    const Step *step;
    char *q, *k, *v, *out;
    int64_t q_stride, k_stride, v_stride; /* elements between tokens; heads are head_dim apart */
    const struct Task *end;               /* one past the last task */
} Call;

typedef struct Task {
    int64_t sequence, head, first, last; /* rows of the (sequence, head): token * group + head in group */
} Task;

/* What a task needs to know about its sequence. */
typedef struct {
    const int32_t *table, *positions; /* positions of the sequence's tokens in this step */
    int64_t group, start, first_key, end_key; /* keys [first_key, end_key) are seen by some row; `start`: first token */
    const char *keys, *values;        /* of this head in block 0 */
} Span;

static Span span_of(const Call *c, const Task *t, size_t itemsize) {
    const Layer *l = c->layer;
    Span s;
    s.group = l->num_heads / l->num_kv_heads;
    s.start = c->step->query_starts[t->sequence];
    s.table = c->step->block_tables + t->sequence * c->step->max_blocks;
    s.positions = c->step->positions + s.start;
    s.end_key = s.positions[(t->last - 1) / s.group] + 1;
    s.first_key = l->window ? MAX(0, s.positions[t->first / s.group] - l->window + 1) : 0;
    s.keys = l->kv + (size_t)(t->head * l->head_stride) * itemsize;
    s.values = s.keys + (size_t)l->value_offset * itemsize;
    return s;
}

#define NUMBER float
#define EXPONENTS 0x7f8000007f800000u
#define LOWEST 0x0080000000800000u
#define SIGNS 0x8000000080000000u
#define LOAD(x) (x)
#define STORE(x) (x)
#define NAME(x) x##_f32
#include "attention_plain.h"

#define NUMBER bf16
#define EXPONENTS 0x7f807f807f807f80u
#define LOWEST 0x0080008000800080u
#define SIGNS 0x8000800080008000u
#define LOAD(x) from_bf16(x)
#define STORE(x) to_bf16(x)
#define NAME(x) x##_bf16
#ifdef HAVE_BF16_VECTORS
#define ROTATE16 rotate_16
#endif
#include "attention_plain.h"

#ifdef HAVE_AMX
#include "attention_amx.h"
#endif

/* Rows that share a pass over keys and values. */
#define TASK_ROWS 256

/* Consecutive tasks read neighbouring memory. */
static Task *cut(const Call *c, int64_t *count) {
    const int64_t group = c->layer->num_heads / c->layer->num_kv_heads, heads = c->layer->num_kv_heads;
    const int32_t *starts = c->step->query_starts;
    int64_t most = 0, n = 0;
    for (int64_t i = 0; i < c->step->num_sequences; i++)
        most += CEIL_DIV((starts[i + 1] - starts[i]) * group, TASK_ROWS) * heads;
    Task *tasks = malloc(sizeof(Task) * (size_t)MAX(most, 1));
    if (!tasks) abort();
    for (int64_t i = 0; i < c->step->num_sequences; i++) {
        const int64_t rows = (starts[i + 1] - starts[i]) * group;
        for (int64_t head = 0; head < heads; head++)
            for (int64_t row = 0; row < rows; row += TASK_ROWS)
                tasks[n++] = (Task){i, head, row, MIN(row + TASK_ROWS, rows)};
    }
    *count = n;
    return tasks;
}

static void attend_rows_of(const Call *c, const Task *t, int tiles) {
#ifdef HAVE_AMX
    if (tiles) {
        attend_amx(c, t);
        return;
    }
#else
    (void)tiles;
#endif
    if (c->layer->dtype == DTYPE_BF16) attend_bf16(c, t);
    else attend_f32(c, t);
}

/* Whether every value that some row of the task sees and another does not is finite: that other row weighs it with 0, and
 * 0 times NaN is NaN. */
static int is_harmless(const Call *c, const Task *t) {
    const Layer *l = c->layer;
    const int is_bf16 = l->dtype == DTYPE_BF16;
    const Span s = span_of(c, t, is_bf16 ? sizeof(bf16) : sizeof(float));
    const int64_t first = s.positions[t->first / s.group], last = s.end_key - 1;
    const int64_t left = l->window ? MAX(s.first_key, last - l->window + 1) : 0; /* keys before it fell out of the window */
    int (*finite)(const Layer *, const Span *, int64_t, int64_t) = is_bf16 ? finite_bf16 : finite_f32;
    return first == last || (finite(l, &s, first + 1, last + 1) && finite(l, &s, s.first_key, left));
}

/* One task; token by token where a value would reach rows that do not see it. Both ways give the same bits. */
static void attend(const Call *c, const Task *t, int tiles) {
    if (is_harmless(c, t)) {
        attend_rows_of(c, t, tiles);
        return;
    }
    const int64_t group = c->layer->num_heads / c->layer->num_kv_heads;
    for (int64_t row = t->first; row < t->last;) {
        const Task one = {t->sequence, t->head, row, MIN(t->last, (row / group + 1) * group)};
        Call call = *c;
        call.end = &one; /* nothing follows that could be asked for ahead */
        attend_rows_of(&call, &one, tiles);
        row = one.last;
    }
}

/* Writes this step's keys and values into the cache (rotated, with the queries, where the layer has tables), then
 * attends. out [num_tokens, num_heads * head_dim]. */
EXPORT void ds_attention(const Layer *layer, const Step *step, char *q, int64_t q_stride, char *k, int64_t k_stride,
                         char *v, int64_t v_stride, char *out) {
    Call call = {layer, step, q, k, v, out, q_stride, k_stride, v_stride, NULL};
    int64_t count = 0;
    Task *tasks = cut(&call, &count);
    call.end = tasks + count;
    int tiles = 0;
#ifdef HAVE_AMX
    tiles = layer->dtype == DTYPE_BF16 && tiles_allowed && amx_attends(layer);
#endif
    OMP(omp parallel num_threads(num_threads) if (num_threads > 1)) {
        OMP(omp for schedule(static))
        for (int64_t token = 0; token < step->num_tokens; token++) {
            if (layer->dtype == DTYPE_BF16) write_token_bf16(&call, token);
            else write_token_f32(&call, token);
        }
#ifdef HAVE_AMX
        if (tiles) configure_tiles((const uint8_t[8]){16, 16, 16, 16, 16, 16, 16, 16});
#endif
        OMP(omp for schedule(dynamic))
        for (int64_t i = 0; i < count; i++) attend(&call, tasks + i, tiles);
#ifdef HAVE_AMX
        if (tiles) _tile_release();
#endif
    }
    free(tasks);
}
