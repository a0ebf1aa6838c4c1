/* Attention on AMX tiles for up to sixteen rows (decoding), as rows. See attention_amx.h, which includes this. */
#pragma once

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
