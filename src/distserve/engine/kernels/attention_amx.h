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

/* Hands out consecutive pieces of scratch memory, multiples of 64 bytes. */
static void *take(char **at, int64_t bytes) {
    void *piece = *at;
    *at += CEIL_DIV(bytes, 64) * 64;
    return piece;
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
    const int64_t first = t->first + group * 16;
    for (int64_t i = 0; i < 16; i++) {
        const int64_t row = MIN(first + i, t->last - 1), token = row / s->group;
        rows[i] = (const bf16 *)c->q + (s->start + token) * c->q_stride + (t->head * s->group + row % s->group) * w->dim;
        lanes->positions[i] = s->positions[token];
        lanes->reference[i] = NOTHING;
        lanes->sum[i] = 0;
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

/* Turns pairs of V's rows into pairs of V^T's columns: 16 x 16 pairs a tile. */
static void transpose_values(const Work *w, int64_t steps) {
    for (int64_t tile = 0; tile < w->dim / 16 * steps; tile++) {
        __m512i r[16];
        bf16 *at = w->values + tile * 512;
        for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(at + i * 32);
        transpose16(r);
        for (int i = 0; i < 16; i++) _mm512_store_si512(at + i * 32, r[i]);
    }
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

/* The same for two groups of rows, 32 keys at a time. */
static void score_pair(const Layer *l, const Span *s, const Work *w, int64_t group, int64_t chunk, int64_t steps) {
    const bf16 *q0 = w->queries + group * w->padded * 16, *q1 = q0 + w->padded * 16;
    const size_t row = (size_t)w->padded * 2;
    BEFORE_TILE_LOAD();
    for (int64_t step = 0; step < steps; step++) {
        const int64_t key = chunk + step * 32;
        const bf16 *low = w->keys + step * 32 * w->padded, *high = low + 16 * w->padded;
        if (w->padded == w->dim) {
            low = stripe(l, s, s->keys, key);
            high = stripe(l, s, s->keys, key + 16 < s->end_key ? key + 16 : key); /* past the end: masked later */
        }
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t d = 0; d < w->padded; d += 32) {
            _tile_loadd(4, low + d, row);
            _tile_loadd(6, q0 + d * 16, 64);
            _tile_loadd(7, q1 + d * 16, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, high + d, row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        float *to = w->scores + step * 512;
        _tile_stored(0, to, 64);
        _tile_stored(1, to + CHUNK * 16, 64);
        _tile_stored(2, to + 256, 64);
        _tile_stored(3, to + CHUNK * 16 + 256, 64);
    }
}

/* Masks what a row must not see, moves the reference where it must, and turns scores into P^T. */
static void soften(const Layer *l, const Work *w, int64_t group, int64_t chunk, int64_t steps) {
    Lanes *lanes = w->lanes + group;
    const __m512 scale = _mm512_set1_ps((float)(l->scale * 1.4426950408889634));
    const int64_t keys = steps * 32;
    float *scores = w->scores + group % 2 * CHUNK * 16;
    bf16 *weights = w->weights + group % 2 * CHUNK * 16;
    if (chunk + keys - 1 > lanes->min_position || (l->window && chunk <= lanes->max_position - l->window)) {
        const __m512i positions = _mm512_loadu_si512(lanes->positions);
        const __m512i before = _mm512_sub_epi32(positions, _mm512_set1_epi32(l->window ? (int)l->window : INT32_MAX));
        const __m512 masked = _mm512_div_ps(_mm512_set1_ps(10 * NOTHING), scale);
        for (int64_t j = 0; j < keys; j++) {
            const __m512i key = _mm512_set1_epi32((int)(chunk + j));
            const __mmask16 seen = _mm512_cmple_epi32_mask(key, positions) & _mm512_cmpgt_epi32_mask(key, before);
            _mm512_store_ps(scores + j * 16, _mm512_mask_loadu_ps(masked, seen, scores + j * 16));
        }
    }
    __m512 top0 = _mm512_load_ps(scores), top1 = _mm512_load_ps(scores + 16);
    for (int64_t j = 2; j < keys; j += 2) {
        top0 = _mm512_max_ps(top0, _mm512_load_ps(scores + j * 16));
        top1 = _mm512_max_ps(top1, _mm512_load_ps(scores + j * 16 + 16));
    }
    const __m512 top = _mm512_mul_ps(_mm512_max_ps(top0, top1), scale);
    __m512 reference = _mm512_loadu_ps(lanes->reference);
    const __mmask16 moves =
        _mm512_cmp_ps_mask(top, _mm512_add_ps(reference, _mm512_set1_ps(LAZY)), _CMP_GT_OQ);
    if (moves) {
        const __m512 one = _mm512_set1_ps(1.0f);
        const __m512 shrink = _mm512_mask_blend_ps(moves, one, exp2_16(_mm512_sub_ps(reference, top)));
        reference = _mm512_mask_blend_ps(moves, reference, top);
        float *out = w->outputs + group * w->dim * 16;
        for (int64_t d = 0; d < w->dim; d++)
            _mm512_store_ps(out + d * 16, _mm512_mul_ps(_mm512_load_ps(out + d * 16), shrink));
        _mm512_storeu_ps(lanes->reference, reference);
        _mm512_storeu_ps(lanes->sum, _mm512_mul_ps(_mm512_loadu_ps(lanes->sum), shrink));
    }
    for (int64_t j = 0; j < keys; j += 2) {
        const __m512 p0 = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + j * 16), scale, reference));
        const __m512 p1 = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + j * 16 + 16), scale, reference));
        _mm512_store_si512(weights + j * 16, pair_rows(p0, p1));
    }
}

/* The softmax of one row of the row form: as `soften`, over its scores [CHUNK]. */
static void soften_row(const Layer *l, const Work *w, int64_t row, int64_t chunk, int64_t steps) {
    Lanes *lanes = w->lanes;
    const __m512 scale = _mm512_set1_ps((float)(l->scale * 1.4426950408889634));
    float *scores = w->rows + row * CHUNK;
    const int64_t position = lanes->positions[row];
    if (chunk + steps * 32 - 1 > position || (l->window && chunk <= position - l->window)) {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i last = _mm512_set1_epi32((int)(position - chunk));
        const __m512i before = _mm512_set1_epi32(l->window ? (int)(position - l->window - chunk) : INT32_MIN);
        const __m512 masked = _mm512_div_ps(_mm512_set1_ps(10 * NOTHING), scale);
        for (int64_t j = 0; j < steps * 32; j += 16) {
            const __m512i key = _mm512_add_epi32(lane, _mm512_set1_epi32((int)j));
            const __mmask16 seen = _mm512_cmple_epi32_mask(key, last) & _mm512_cmpgt_epi32_mask(key, before);
            _mm512_store_ps(scores + j, _mm512_mask_loadu_ps(masked, seen, scores + j));
        }
    }
    __m512 most = _mm512_load_ps(scores);
    for (int64_t j = 16; j < steps * 32; j += 16) most = _mm512_max_ps(most, _mm512_load_ps(scores + j));
    const __m512 top = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), scale);
    __m512 reference = _mm512_set1_ps(lanes->reference[row]);
    if (_mm512_cmp_ps_mask(top, _mm512_add_ps(reference, _mm512_set1_ps(LAZY)), _CMP_GT_OQ)) {
        const __m512 shrink = exp2_16(_mm512_sub_ps(reference, top));
        reference = top;
        lanes->reference[row] = _mm512_cvtss_f32(top);
        for (int64_t d = 0; d < w->dim; d += 16) {
            float *out = w->outputs + d * 16 + row * 16;
            _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(out), shrink));
        }
        _mm512_store_ps(w->sums + row * 16, _mm512_mul_ps(_mm512_load_ps(w->sums + row * 16), shrink));
    }
    for (int64_t step = 0; step < steps; step++) {
        const __m512 p0 = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + step * 32), scale, reference));
        const __m512 p1 = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + step * 32 + 16), scale, reference));
        _mm512_store_si512(w->weights + step * 512 + row * 32, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
    }
}

/* scores^T [keys][16] -> rows [16][CHUNK], four query rows at a time, sixteen keys at a time. */
static void turn_scores(const Work *w, int64_t rows, int64_t steps) {
    for (int64_t row = 0; row < rows; row += 4)
        for (int64_t key = 0; key < steps * 32; key += 16) {
            const float *from = w->scores + key * 16 + row;
            __m512 r[4];
            for (int i = 0; i < 4; i++) {
                r[i] = _mm512_castps128_ps512(_mm_load_ps(from + i * 16));
                r[i] = _mm512_mask_broadcast_f32x4(r[i], 0x00f0, _mm_load_ps(from + (4 + i) * 16));
                r[i] = _mm512_mask_broadcast_f32x4(r[i], 0x0f00, _mm_load_ps(from + (8 + i) * 16));
                r[i] = _mm512_mask_broadcast_f32x4(r[i], 0xf000, _mm_load_ps(from + (12 + i) * 16));
            }
            const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1]));
            const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
            const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]));
            const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
            float *to = w->rows + row * CHUNK + key;
            _mm512_store_pd(to, _mm512_unpacklo_pd(a, c));
            _mm512_store_pd(to + CHUNK, _mm512_unpackhi_pd(a, c));
            _mm512_store_pd(to + 2 * CHUNK, _mm512_unpacklo_pd(b, d));
            _mm512_store_pd(to + 3 * CHUNK, _mm512_unpackhi_pd(b, d));
        }
}

/* The row form's outputs and sums over a chunk, 64 dimensions at a time: out += P . V, sums += P . 1. Tiles: 0-3 outputs,
 * 4 values, 5 ones, 6 weights, 7 sums. */
static void gather_rows(const Work *w, int64_t steps) {
    float *out = w->outputs;
    BEFORE_TILE_LOAD();
    _tile_loadd(5, w->ones, 64);
    _tile_loadd(7, w->sums, 64);
    for (int64_t d = 0; d < w->dim; d += 64, out += 1024) {
        const bf16 *v = w->values + d * 32;
        const int64_t tiles = MIN(4, (w->dim - d) / 16);
        _tile_loadd(0, out, 64);
        if (tiles > 1) _tile_loadd(1, out + 256, 64);
        if (tiles > 2) _tile_loadd(2, out + 512, 64);
        if (tiles > 3) _tile_loadd(3, out + 768, 64);
        for (int64_t step = 0; step < steps; step++, v += w->dim * 32) {
            _tile_loadd(6, w->weights + step * 512, 64);
            if (d == 0) _tile_dpbf16ps(7, 6, 5);
            _tile_loadd(4, v, 64);
            _tile_dpbf16ps(0, 6, 4);
            if (tiles > 1) {
                _tile_loadd(4, v + 512, 64);
                _tile_dpbf16ps(1, 6, 4);
            }
            if (tiles > 2) {
                _tile_loadd(4, v + 1024, 64);
                _tile_dpbf16ps(2, 6, 4);
            }
            if (tiles > 3) {
                _tile_loadd(4, v + 1536, 64);
                _tile_dpbf16ps(3, 6, 4);
            }
        }
        _tile_stored(0, out, 64);
        if (tiles > 1) _tile_stored(1, out + 256, 64);
        if (tiles > 2) _tile_stored(2, out + 512, 64);
        if (tiles > 3) _tile_stored(3, out + 768, 64);
    }
    _tile_stored(7, w->sums, 64);
}

/* The transposed form's, of two groups, 32 dimensions at a time: out^T += V^T . P^T, sum += 1 . P^T. Tiles: 0-3 outputs
 * (or 0, 1 sums), 4, 5 values (or ones), 6, 7 weights. */
static void gather_pair(const Work *w, int64_t group, int64_t steps) {
    const bf16 *p0 = w->weights, *p1 = p0 + CHUNK * 16;
    float *out0 = w->outputs + group * w->dim * 16, *out1 = out0 + w->dim * 16;
    BEFORE_TILE_LOAD();
    for (int64_t d = 0; d < w->dim; d += 32, out0 += 512, out1 += 512) {
        const bf16 *v = w->values + d * 32;
        const int wide = d + 32 <= w->dim;
        _tile_loadd(0, out0, 64);
        _tile_loadd(1, out1, 64);
        if (wide) {
            _tile_loadd(2, out0 + 256, 64);
            _tile_loadd(3, out1 + 256, 64);
        }
        for (int64_t step = 0; step < steps; step++, v += w->dim * 32) {
            _tile_loadd(4, v, 64);
            _tile_loadd(6, p0 + step * 512, 64);
            _tile_loadd(7, p1 + step * 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (wide) {
                _tile_loadd(5, v + 512, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, out0, 64);
        _tile_stored(1, out1, 64);
        if (wide) {
            _tile_stored(2, out0 + 256, 64);
            _tile_stored(3, out1 + 256, 64);
        }
    }
    Lanes *lanes = w->lanes + group; /* a stride of 0: all sixteen rows of these tiles are the one row of sums */
    _tile_loadd(4, w->ones, 64);
    _tile_loadd(0, lanes[0].sum, 0);
    _tile_loadd(1, lanes[1].sum, 0);
    for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(6, p0 + step * 512, 64);
        _tile_loadd(7, p1 + step * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, lanes[0].sum, 0);
    _tile_stored(1, lanes[1].sum, 0);
}

static void write_transposed(const Call *c, const Task *t, const Span *s, const Work *w, int64_t group) {
    const Lanes *lanes = w->lanes + group;
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_loadu_ps(lanes->sum));
    const int64_t first = t->first + group * 16, count = MIN(16, t->last - first);
    for (int64_t d = 0; d < w->dim; d += 16) {
        const float *out = w->outputs + (group * w->dim + d) * 16;
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(out + i * 16), inverse));
        transpose16(r);
        for (int64_t i = 0; i < count; i++) {
            const int64_t row = first + i, token = s->start + row / s->group, head = t->head * s->group + row % s->group;
            bf16 *to = (bf16 *)c->out + (token * c->layer->num_heads + head) * w->dim + d;
            _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(r[i])));
        }
    }
}

static void write_rows(const Call *c, const Task *t, const Span *s, const Work *w) {
    for (int64_t row = t->first; row < t->last; row++) {
        const int64_t i = row - t->first, token = s->start + row / s->group, head = t->head * s->group + row % s->group;
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(w->sums + i * 16));
        bf16 *to = (bf16 *)c->out + (token * c->layer->num_heads + head) * w->dim;
        for (int64_t d = 0; d < w->dim; d += 16) {
            const __m512 y = _mm512_mul_ps(_mm512_load_ps(w->outputs + d * 16 + i * 16), inverse);
            _mm256_storeu_si256((__m256i *)(to + d), (__m256i)_mm512_cvtneps_pbh(y));
        }
    }
}

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
        for (int64_t group = 0; group < w.groups; group += 2) {
            const int64_t seen = w.lanes[group + 1].max_position + 1 - chunk;
            if (seen <= 0) continue;
            const int64_t steps = CEIL_DIV(MIN(CHUNK, seen), 32);
            score_pair(l, &s, &w, group, chunk, steps);
            soften(l, &w, group, chunk, steps);
            soften(l, &w, group + 1, chunk, steps);
            gather_pair(&w, group, steps);
        }
    }
    if (!transposed) write_rows(c, t, &s, &w);
    else
        for (int64_t group = 0; group < CEIL_DIV(t->last - t->first, 16); group++) write_transposed(c, t, &s, &w, group);
}
