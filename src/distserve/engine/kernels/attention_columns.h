/* Attention on AMX tiles for many rows (prompts): everything stays transposed. See attention_amx.h, which includes this. */
#pragma once

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

/* As `score` (attention_amx.h), for two groups of rows, 32 keys at a time. */
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
    bf16 *rows[16];
    int64_t token = first / s->group, head = first % s->group;
    for (int64_t i = 0; i < count; i++) {
        rows[i] = (bf16 *)c->out + ((s->start + token) * c->layer->num_heads + t->head * s->group + head) * w->dim;
        if (++head == s->group) head = 0, token++;
    }
    for (int64_t d = 0; d < w->dim; d += 16) {
        const float *out = w->outputs + (group * w->dim + d) * 16;
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(out + i * 16), inverse));
        transpose16(r);
        for (int64_t i = 0; i < count; i++)
            _mm256_storeu_si256((__m256i *)(rows[i] + d), (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(r[i])));
    }
}
