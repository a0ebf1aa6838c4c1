/* A task's attention on AMX tiles, transposed so that sixteen query rows lie in the lanes of every vector:
 *
 *     scores^T [keys, 16]  = K [keys, dim] . Q^T         K comes straight from the cache as the A operand
 *     probabilities        = vertical maximum, 2^x, vertical sum: no shuffles across lanes
 *     out^T [dim, 16]     += V^T [dim, keys] . P^T       P^T is a pair-interleave of score rows
 *
 * Only V^T must be made: per chunk of keys, once for all rows of the task.
 */
#pragma once

typedef struct {
    float reference[16], sum[16];
    int32_t positions[16];
    int32_t min_position, max_position;
} Lanes;

/* One task's memory: per sixteen rows the query tiles, the output so far and the softmax state; then what a chunk needs. */
typedef struct {
    bf16 *queries;  /* [groups][padded / 32][16][16][2] */
    float *outputs; /* [groups][dim][16] */
    Lanes *lanes;   /* [groups] */
    bf16 *values;   /* V^T: [dim / 16][CHUNK / 32][16][32] */
    bf16 *keys;     /* [CHUNK][padded], only where dim % 32 */
    float *scores;  /* [CHUNK][16] */
    bf16 *weights;  /* P^T: [CHUNK / 32][16][16][2] */
    int64_t groups, dim, padded;
} Work;

static int amx_attends(const Layer *l) {
    return l->head_dim % 16 == 0 && l->head_dim <= 256 && l->block_size % 16 == 0 && l->scale > 0;
}

static Work lay_out(int64_t rows, int64_t dim) {
    Work w = {.groups = CEIL_DIV(rows, 16), .dim = dim, .padded = CEIL_DIV(dim, 32) * 32};
    const size_t sizes[] = {(size_t)(w.groups * w.padded) * 32, (size_t)(w.groups * dim) * 64,
                            (size_t)w.groups * CEIL_DIV(sizeof(Lanes), 64) * 64, (size_t)(dim * CHUNK) * 2,
                            (size_t)(w.padded * CHUNK) * 2, CHUNK * 64, CHUNK * 32};
    size_t total = 0, at[7];
    for (int i = 0; i < 7; i++) {
        at[i] = total;
        total += sizes[i];
    }
    char *memory = scratch(total);
    w.queries = (bf16 *)(memory + at[0]);
    w.outputs = (float *)(memory + at[1]);
    w.lanes = (Lanes *)(memory + at[2]);
    w.values = (bf16 *)(memory + at[3]);
    w.keys = (bf16 *)(memory + at[4]);
    w.scores = (float *)(memory + at[5]);
    w.weights = (bf16 *)(memory + at[6]);
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

/* V^T of the chunk's keys. Slots that no row sees count as zero: they may hold NaN. */
static void load_values(const Layer *l, const Span *s, const Work *w, int64_t chunk, int64_t steps) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t step = 0; step < steps; step++) {
        const int64_t key = chunk + step * 32;
        const bf16 *halves[2] = {stripe(l, s, s->values, key),
                                 key + 16 < s->end_key ? stripe(l, s, s->values, key + 16) : NULL};
        const int whole = key >= s->first_key && key + 32 <= s->end_key;
        for (int64_t d = 0; d < w->dim; d += 32) {
            const __mmask32 mask = d + 32 <= w->dim ? 0xffffffff : 0xffff;
            __m512i a[16], b[16];
            for (int i = 0; i < 16; i++) {
                const int64_t even = key + 2 * i;
                const bf16 *from = halves[i / 8] + (2 * i % 16) * w->dim + d;
                const int in0 = whole || (even >= s->first_key && even < s->end_key);
                const int in1 = whole || (even + 1 >= s->first_key && even + 1 < s->end_key);
                const __m512i x = in0 ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
                const __m512i y = in1 ? _mm512_maskz_loadu_epi16(mask, from + w->dim) : _mm512_setzero_si512();
                a[i] = _mm512_permutex2var_epi16(x, low, y);
                b[i] = _mm512_permutex2var_epi16(x, high, y);
            }
            bf16 *to = w->values + (d / 16 * (CHUNK / 32) + step) * 512;
            transpose16(a);
            for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * 32, a[i]);
            if (mask != 0xffffffff) continue;
            transpose16(b);
            for (int i = 0; i < 16; i++) _mm512_store_si512(to + CHUNK * 16 + i * 32, b[i]);
        }
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
            _tile_loadd(5, keys[1] + d, row);
            _tile_dpbf16ps(1, 5, 6);
            if (wide) {
                _tile_loadd(4, keys[2] + d, row);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(5, keys[3] + d, row);
                _tile_dpbf16ps(3, 5, 6);
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

/* Masks what a row must not see, moves the reference where it must, and turns scores into P^T and the running sum. */
static void soften(const Layer *l, const Span *s, const Work *w, int64_t group, int64_t chunk, int64_t steps) {
    Lanes *lanes = w->lanes + group;
    const __m512 scale = _mm512_set1_ps((float)(l->scale * 1.4426950408889634));
    const int64_t keys = steps * 32;
    float *scores = w->scores;
    (void)s;
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
    __m512 reference = _mm512_loadu_ps(lanes->reference), sum = _mm512_loadu_ps(lanes->sum);
    const __mmask16 moves =
        _mm512_cmp_ps_mask(top, _mm512_add_ps(reference, _mm512_set1_ps(LAZY)), _CMP_GT_OQ);
    if (moves) {
        const __m512 one = _mm512_set1_ps(1.0f);
        const __m512 shrink = _mm512_mask_blend_ps(moves, one, exp2_16(_mm512_sub_ps(reference, top)));
        reference = _mm512_mask_blend_ps(moves, reference, top);
        sum = _mm512_mul_ps(sum, shrink);
        float *out = w->outputs + group * w->dim * 16;
        for (int64_t d = 0; d < w->dim; d++)
            _mm512_store_ps(out + d * 16, _mm512_mul_ps(_mm512_load_ps(out + d * 16), shrink));
        _mm512_storeu_ps(lanes->reference, reference);
    }
    __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
    for (int64_t j = 0; j < keys; j += 2) {
        const __m512 p0 = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + j * 16), scale, reference));
        const __m512 p1 = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + j * 16 + 16), scale, reference));
        sum0 = _mm512_add_ps(sum0, p0);
        sum1 = _mm512_add_ps(sum1, p1);
        _mm512_store_si512(w->weights + j * 16, pair_rows(p0, p1));
    }
    _mm512_storeu_ps(lanes->sum, _mm512_add_ps(sum, _mm512_add_ps(sum0, sum1)));
}

/* out^T += V^T . P^T, 64 rows of out^T at a time. */
static void gather_values(const Work *w, int64_t group, int64_t steps) {
    float *out = w->outputs + group * w->dim * 16;
    BEFORE_TILE_LOAD();
    for (int64_t d = 0; d < w->dim; d += 64, out += 1024) {
        const bf16 *v = w->values + d / 16 * CHUNK * 16;
        const int64_t tiles = MIN(4, (w->dim - d) / 16);
        _tile_loadd(0, out, 64);
        if (tiles > 1) _tile_loadd(1, out + 256, 64);
        if (tiles > 2) _tile_loadd(2, out + 512, 64);
        if (tiles > 3) _tile_loadd(3, out + 768, 64);
        for (int64_t step = 0; step < steps; step++, v += 512) {
            _tile_loadd(6, w->weights + step * 512, 64);
            _tile_loadd(4, v, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (tiles > 1) {
                _tile_loadd(5, v + CHUNK * 16, 64);
                _tile_dpbf16ps(1, 5, 6);
            }
            if (tiles > 2) {
                _tile_loadd(4, v + CHUNK * 32, 64);
                _tile_dpbf16ps(2, 4, 6);
            }
            if (tiles > 3) {
                _tile_loadd(5, v + CHUNK * 48, 64);
                _tile_dpbf16ps(3, 5, 6);
            }
        }
        _tile_stored(0, out, 64);
        if (tiles > 1) _tile_stored(1, out + 256, 64);
        if (tiles > 2) _tile_stored(2, out + 512, 64);
        if (tiles > 3) _tile_stored(3, out + 768, 64);
    }
}

static void write_rows(const Call *c, const Task *t, const Span *s, const Work *w, int64_t group) {
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

static void copy_keys(const Layer *l, const Span *s, const Work *w, int64_t chunk, int64_t steps) {
    memset(w->keys, 0, (size_t)(steps * 32 * w->padded) * 2);
    for (int64_t key = chunk; key < MIN(chunk + steps * 32, s->end_key); key++)
        memcpy(w->keys + (key - chunk) * w->padded, stripe(l, s, s->keys, key / 16 * 16) + key % 16 * w->dim,
               (size_t)w->dim * 2);
}

static inline __attribute__((always_inline)) void prefetch_chunk(const Layer *l, const Span *s, int64_t chunk) {
    const int64_t end = MIN(chunk + CHUNK, s->end_key), lines = CEIL_DIV(l->head_dim * 32, 64);
    for (int64_t key = chunk; key < end; key += 16) {
        const char *k = (const char *)stripe(l, s, s->keys, key), *v = (const char *)stripe(l, s, s->values, key);
        for (int64_t i = 0; i < lines; i++) _mm_prefetch(k + i * 64, _MM_HINT_T1);
        for (int64_t i = 0; i < lines; i++) _mm_prefetch(v + i * 64, _MM_HINT_T1);
    }
}

static void attend_amx(const Call *c, const Task *t) {
    const Layer *l = c->layer;
    const Span s = span_of(c, t, sizeof(bf16));
    const Work w = lay_out(t->last - t->first, l->head_dim);
    for (int64_t group = 0; group < w.groups; group++) load_queries(c, t, &s, &w, group);
    for (int64_t chunk = s.first_key / CHUNK * CHUNK; chunk < s.end_key; chunk += CHUNK) {
        const int64_t most = CEIL_DIV(MIN(CHUNK, s.end_key - chunk), 32);
        if (chunk + CHUNK < s.end_key) prefetch_chunk(l, &s, chunk + CHUNK);
        if (w.padded != w.dim) copy_keys(l, &s, &w, chunk, most);
        load_values(l, &s, &w, chunk, most);
        for (int64_t group = 0; group < w.groups; group++) {
            const int64_t seen = w.lanes[group].max_position + 1 - chunk;
            if (seen <= 0) continue;
            const int64_t steps = CEIL_DIV(MIN(CHUNK, seen), 32);
            score(l, &s, &w, group, chunk, steps);
            soften(l, &s, &w, group, chunk, steps);
            gather_values(&w, group, steps);
        }
    }
    for (int64_t group = 0; group < w.groups; group++) write_rows(c, t, &s, &w, group);
}
