/* A task's attention on AMX tiles. Scores are made transposed, because keys can then come straight from the cache:
 *
 *     scores^T [keys, 16] = K [keys, dim] . Q^T
 *
 * What follows has two forms. Many rows (prompts) stay transposed, sixteen query rows in the lanes of every vector,
 * and two such groups at a time, so that each tile of keys or values is loaded for both:
 *
 *     P^T = 2^scores^T, all vertical          out^T [dim, 16] += V^T [dim, keys] . P^T      sum [16]     += 1 . P^T
 *
 * Up to sixteen rows (decoding) are turned into rows, which wastes no lanes on rows that are not there:
 *
 *     P   = 2^scores, row by row              out [rows, dim]  += P . V                     sum [rows]   += P . 1
 *
 * A tile product adds the same products in the same order in both forms, so they agree bit for bit.
 */
#pragma once

#include "common.h"

/* Sixteen query rows: their softmax state and where they stand. */
typedef struct __attribute__((aligned(64))) {
    float reference[16], sum[16]; /* `sum` is used by the transposed form */
    int32_t positions[16];
    int32_t min_position, max_position;
} Lanes;

/* One task's memory: per sixteen rows the query tiles, the output so far and the softmax state; then what a chunk needs. */
typedef struct {
    bf16 *queries;  /* [groups][padded / 32][16][16][2] */
    float *outputs; /* transposed: [groups][dim][16]; rows: [dim / 16][16][16] */
    Lanes *lanes;   /* [groups] */
    bf16 *values;   /* [CHUNK / 32][dim / 16][16][32]: pairs of V's rows, or of V^T's columns */
    bf16 *clean;    /* [16][dim]: value rows of which some must not be read */
    bf16 *keys;     /* [CHUNK][padded], only where dim % 32 */
    float *scores;  /* transposed: [2][CHUNK][16]; rows: [CHUNK][16] */
    float *rows;    /* [16][CHUNK]: scores, turned */
    float *sums;    /* [16][16]: of the row form; all columns equal */
    bf16 *weights;  /* P^T: [2][CHUNK / 32][16][16][2], or P: [CHUNK / 32][16][32] */
    bf16 *ones;     /* [16][32] */
    int64_t groups, dim, padded;
} Work;

#define PIECES (CHUNK / 8)

/* The next chunk's keys and values, asked for a few lines at a time while this chunk is computed. */
typedef struct {
    const char *pieces[PIECES]; /* 32 keys or values each (16 where blocks are that short); the last may repeat */
    int64_t shift;              /* there are 4 << shift of them */
} Prefetch;

/* The n-th four lines, each piece in turn: several pages at once keep several hardware streams busy. Always inline: see
 * linear.h. */
static inline __attribute__((always_inline)) void prefetch_lines(const Prefetch *p, int64_t n) {
    const char *const *pieces = p->pieces + (n & ((1 << p->shift) - 1)) * 4;
    for (int i = 0; i < 4; i++) _mm_prefetch(pieces[i] + (n >> p->shift) * 64, _MM_HINT_T1);
}

static int amx_attends(const Layer *l) {
    return l->head_dim % 16 == 0 && l->head_dim <= 256 && l->block_size % 16 == 0 && l->scale > 0;
}

static Work lay_out(int64_t rows, int64_t dim) {
    /* beyond one group there are pairs of groups; a missing last one repeats the last row */
    Work w = {.groups = rows <= 16 ? 1 : CEIL_DIV(rows, 32) * 2, .dim = dim, .padded = CEIL_DIV(dim, 32) * 32};
    const int64_t fixed = (dim + w.padded + 64 + 32 + 32) * CHUNK * 2 + dim * 32 + 4096;
    char *at = scratch((size_t)(w.groups * ((int64_t)sizeof(Lanes) + 64 + w.padded * 32 + dim * 64) + fixed));
    w.queries = take(&at, w.groups * w.padded * 32);
    w.outputs = take(&at, w.groups * dim * 64);
    w.lanes = take(&at, w.groups * (int64_t)sizeof(Lanes));
    w.values = take(&at, dim * CHUNK * 2);
    w.clean = take(&at, dim * 32);
    w.keys = take(&at, w.padded * CHUNK * 2);
    w.scores = take(&at, 2 * CHUNK * 64);
    w.rows = take(&at, CHUNK * 64);
    w.weights = take(&at, 2 * CHUNK * 32);
    w.sums = take(&at, 1024);
    w.ones = take(&at, 1024);
    for (int i = 0; i < 512; i++) w.ones[i] = 0x3f80;
    return w;
}

/* Sixteen query rows into B tiles, and a fresh softmax state. Lanes past the last row repeat its position. */
static void load_queries(const Call *c, const Task *t, const Span *s, const Work *w, int64_t group) {
    Lanes *lanes = w->lanes + group;
    const bf16 *rows[16];
    const int64_t first = MIN(t->first + group * 16, t->last - 1);
    int64_t token = first / s->group, head = first % s->group;
    for (int64_t i = 0; i < 16; i++) {
        rows[i] = (const bf16 *)c->q + (s->start + token) * c->q_stride + (t->head * s->group + head) * w->dim;
        lanes->positions[i] = s->positions[token];
        lanes->reference[i] = NOTHING;
        lanes->sum[i] = 0;
        if (first + i < t->last - 1 && ++head == s->group) head = 0, token++;
    }
    lanes->min_position = lanes->positions[0];
    lanes->max_position = lanes->positions[15];
    memset(w->outputs + group * w->dim * 16, 0, (size_t)w->dim * 64);
    for (int64_t d = 0; d < w->padded; d += 32) {
        const __mmask32 mask = d + 32 <= w->dim ? 0xffffffff : 0xffff;
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi16(mask, rows[i] + d);
        transpose16(r);
        bf16 *to = w->queries + group * w->padded * 16 + d * 16;
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * 32, r[i]);
    }
}

/* Where sixteen consecutive keys (or, with the value pointer, values) lie. `key` is a multiple of 16. */
static inline const bf16 *stripe(const Layer *l, const Span *s, const char *base, int64_t key) {
    return (const bf16 *)base + s->table[key / l->block_size] * l->block_stride + key % l->block_size * l->head_dim;
}

/* Sixteen value rows, `dim` apart, into eight rows of pairs: half a B tile per sixteen dimensions. */
static inline __attribute__((always_inline)) void pair_half(const bf16 *from, bf16 *to, int64_t dim,
                                                            const Prefetch *next, int64_t *n) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < 8; i++, from += 2 * dim, to += 32)
        for (int64_t d = 0; d < dim; d += 32) {
            const __mmask32 inside = d + 32 <= dim ? 0xffffffff : 0xffff;
            const __m512i x = _mm512_maskz_loadu_epi16(inside, from + d);
            const __m512i y = _mm512_maskz_loadu_epi16(inside, from + dim + d);
            _mm512_store_si512(to + d * 32, _mm512_permutex2var_epi16(x, low, y));
            if (d + 32 <= dim) _mm512_store_si512(to + d * 32 + 512, _mm512_permutex2var_epi16(x, high, y));
            if (d % 64 == 0) prefetch_lines(next, (*n)++);
        }
}

/* Pairs of the chunk's value rows, as the B operand of P . V. Slots that no row sees count as zero: they may hold NaN.
 * Returns how far it came with `next`: not to the end, as a burst would fill the core's few line buffers. */
static int64_t pair_values(const Layer *l, const Span *s, const Work *w, int64_t chunk, int64_t steps,
                        const Prefetch *next) {
    const int64_t dim = w->dim;
    int64_t n = 0;
    for (int64_t half = 0; half < steps * 2; half++) {
        const int64_t key = chunk + half * 16, first = MAX(0, s->first_key - key), end = MIN(16, s->end_key - key);
        bf16 *to = w->values + half / 2 * 32 * dim + half % 2 * 256;
        const bf16 *from = w->clean;
        if (first >= end) {
            memset(w->clean, 0, (size_t)dim * 32);
        } else {
            from = stripe(l, s, s->values, key);
            if (first > 0 || end < 16) {
                memset(w->clean, 0, (size_t)dim * 32);
                memcpy(w->clean + first * dim, from + first * dim, (size_t)((end - first) * dim) * 2);
                from = w->clean;
            }
        }
        if (dim == 64) pair_half(from, to, 64, next, &n);
        else if (dim == 128) pair_half(from, to, 128, next, &n);
        else pair_half(from, to, dim, next, &n);
    }
    return n;
}

/* scores^T of keys [chunk, chunk + 32 steps) for one group of rows; sixteen keys a tile, 64 keys at a time. */
static void score(const Layer *l, const Span *s, const Work *w, int64_t group, int64_t chunk, int64_t steps) {
    const bf16 *q = w->queries + group * w->padded * 16;
    const size_t row = (size_t)w->padded * 2;
    BEFORE_TILE_LOAD();
    for (int64_t step = 0; step < steps; step += 2) {
        const bf16 *keys[4];
        const int wide = step + 1 < steps;
        for (int i = 0; i < 4; i++) {
            const int64_t key = chunk + step * 32 + i * 16;
            if (w->padded != w->dim) keys[i] = w->keys + (step * 32 + i * 16) * w->padded;
            else keys[i] = stripe(l, s, s->keys, key < s->end_key ? key : chunk); /* past the end: masked later */
        }
        _tile_zero(0);
        _tile_zero(1);
        if (wide) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t d = 0; d < w->padded; d += 32) {
            _tile_loadd(6, q + d * 16, 64);
            _tile_loadd(4, keys[0] + d, row);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(4, keys[1] + d, row);
            _tile_dpbf16ps(1, 4, 6);
            if (wide) {
                _tile_loadd(4, keys[2] + d, row);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(4, keys[3] + d, row);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
        float *to = w->scores + step * 512;
        _tile_stored(0, to, 64);
        _tile_stored(1, to + 256, 64);
        if (wide) {
            _tile_stored(2, to + 512, 64);
            _tile_stored(3, to + 768, 64);
        }
    }
}

#include "attention_columns.h"
#include "attention_rows.h"

static void copy_keys(const Layer *l, const Span *s, const Work *w, int64_t chunk, int64_t steps) {
    memset(w->keys, 0, (size_t)(steps * 32 * w->padded) * 2);
    for (int64_t key = chunk; key < MIN(chunk + steps * 32, s->end_key); key++)
        memcpy(w->keys + (key - chunk) * w->padded, stripe(l, s, s->keys, key / 16 * 16) + key % 16 * w->dim,
               (size_t)w->dim * 2);
}

/* What will be read after this chunk: the next one, or the next task's first. */
static Prefetch plan_prefetch(const Call *c, const Task *t, const Span *s, int64_t chunk) {
    const Layer *l = c->layer;
    const int64_t size = l->block_size % 32 ? 16 : 32;
    Prefetch p = {.shift = (size == 32 ? 0 : 1) + (CHUNK == 128)};
    Span other;
    int64_t count = 0;
    if (chunk + CHUNK < s->end_key) {
        chunk += CHUNK;
    } else if (t + 1 < c->end) {
        other = span_of(c, t + 1, sizeof(bf16));
        s = &other;
        chunk = s->first_key / CHUNK * CHUNK;
    }
    for (int64_t key = chunk; key < MIN(chunk + CHUNK, s->end_key); key += size) {
        p.pieces[count++] = (const char *)stripe(l, s, s->keys, key);
        p.pieces[count++] = (const char *)stripe(l, s, s->values, key);
    }
    for (; count < PIECES; count++) p.pieces[count] = p.pieces[count - 1];
    return p;
}

static void attend_amx(const Call *c, const Task *t) {
    const Layer *l = c->layer;
    const Span s = span_of(c, t, sizeof(bf16));
    const Work w = lay_out(t->last - t->first, l->head_dim);
    const int transposed = w.groups > 1;
    for (int64_t group = 0; group < w.groups; group++) load_queries(c, t, &s, &w, group);
    if (!transposed) {
        memset(w.sums, 0, 1024);
        memset(w.weights, 0, CHUNK * 32);
    }
    for (int64_t chunk = s.first_key / CHUNK * CHUNK; chunk < s.end_key; chunk += CHUNK) {
        const int64_t most = CEIL_DIV(MIN(CHUNK, s.end_key - chunk), 32);
        const Prefetch next = plan_prefetch(c, t, &s, chunk);
        const int is_first = chunk <= s.first_key;
        if (w.padded != w.dim && (transposed || is_first)) copy_keys(l, &s, &w, chunk, most);
        if (!transposed && is_first) score(l, &s, &w, 0, chunk, most);
        int64_t asked = pair_values(l, &s, &w, chunk, most, &next);
        if (!transposed) {
            turn_scores(&w, t->last - t->first, most);
            const int64_t after = chunk + CHUNK; /* its scores are made by the tiles while this chunk's softmax runs */
            if (after < s.end_key) {
                if (w.padded != w.dim) copy_keys(l, &s, &w, after, CEIL_DIV(MIN(CHUNK, s.end_key - after), 32));
                score(l, &s, &w, 0, after, CEIL_DIV(MIN(CHUNK, s.end_key - after), 32));
            }
            for (int64_t row = 0; row < t->last - t->first; row++) soften_row(l, &w, row, chunk, most);
            for (; asked < CHUNK * w.dim / 64; asked++) prefetch_lines(&next, asked);
            gather_rows(&w, most);
            continue;
        }
        transpose_values(&w, most);
        int64_t softened = 0, softened_steps = 0; /* tiles wait long for what was just written: others go first */
        for (int64_t group = 0; group < w.groups; group += 2) {
            const int64_t seen = w.lanes[group + 1].max_position + 1 - chunk;
            if (seen <= 0) continue;
            const int64_t steps = CEIL_DIV(MIN(CHUNK, seen), 32);
            score_pair(l, &s, &w, group, chunk, steps);
            if (softened_steps) gather_pair(&w, softened, softened_steps);
            soften(l, &w, group, chunk, steps);
            soften(l, &w, group + 1, chunk, steps);
            softened = group;
            softened_steps = steps;
        }
        gather_pair(&w, softened, softened_steps);
    }
    if (!transposed) write_rows(c, t, &s, &w);
    else
        for (int64_t group = 0; group < CEIL_DIV(t->last - t->first, 16); group++) write_transposed(c, t, &s, &w, group);
}
