/* Rotation, cache writes and attention in plain C, for any head size and any processor. Included once per number format,
 * with NUMBER, LOAD, STORE, NAME and the numbers' bits (a 64-bit word of them) defined; what needs no format is in
 * attention_vectors.h.
 */
#include "attention_vectors.h"

/* Pairs (i, half + i) of one head, turned by the angle of its position; `to` may be x. */
static inline void NAME(rotate)(const NUMBER *x, NUMBER *to, const float *restrict cosines, const float *restrict sines,
                                int64_t half) {
#ifdef ROTATE16
    for (int64_t i = 0; i < half; i += 16) ROTATE16(x + i, to + i, cosines + i, sines + i, half, half - i);
#else
    for (int64_t i = 0; i < half; i++) {
        const float a = LOAD(x[i]), b = LOAD(x[i + half]);
        to[i] = STORE(a * cosines[i] - b * sines[i]);
        to[i + half] = STORE(b * cosines[i] + a * sines[i]);
    }
#endif
}

/* Rotates one token's queries in place, and its keys on their way to their slot, beside its values. */
static void NAME(write_token)(const Call *c, int64_t token) {
    const Layer *l = c->layer;
    const int64_t dim = l->head_dim, slot = c->step->slots[token];
    NUMBER *q = (NUMBER *)c->q + token * c->q_stride;
    const NUMBER *k = (const NUMBER *)c->k + token * c->k_stride, *v = (const NUMBER *)c->v + token * c->v_stride;
    NUMBER *to = (NUMBER *)l->kv + slot / l->block_size * l->block_stride + slot % l->block_size * dim;
    const int64_t at = c->step->positions[token] * (dim / 2);
    const float *cosines = l->cosines + at, *sines = l->sines + at;
    for (int64_t head = 0; l->cosines && head < l->num_heads; head++)
        NAME(rotate)(q + head * dim, q + head * dim, cosines, sines, dim / 2);
    for (int64_t head = 0; head < l->num_kv_heads; head++, k += dim, v += dim, to += l->head_stride) {
        if (l->cosines) NAME(rotate)(k, to, cosines, sines, dim / 2);
        else memcpy(to, k, (size_t)dim * sizeof(NUMBER));
        memcpy(to + l->value_offset, v, (size_t)dim * sizeof(NUMBER));
    }
}

static inline const NUMBER *NAME(key_at)(const Layer *l, const Span *s, int64_t key) {
    const uint32_t block = (uint32_t)key / (uint32_t)l->block_size, token = (uint32_t)key % (uint32_t)l->block_size;
    return (const NUMBER *)s->keys + s->table[block] * l->block_stride + token * l->head_dim;
}

/* Four keys, `dim` apart, into four columns of a panel. */
static inline void NAME(turn_keys)(const NUMBER *restrict from, int64_t dim, float *restrict to) {
    const int64_t whole = dim / 4 * 4;
    for (int64_t d = 0; d < whole; d += 4, to += 4 * PANEL) {
        const Four a = NAME(load_four)(from + d), b = NAME(load_four)(from + dim + d);
        const Four c = NAME(load_four)(from + 2 * dim + d), e = NAME(load_four)(from + 3 * dim + d);
        const Four ab = SHUFFLE(a, b, 0, 4, 1, 5), AB = SHUFFLE(a, b, 2, 6, 3, 7);
        const Four ce = SHUFFLE(c, e, 0, 4, 1, 5), CE = SHUFFLE(c, e, 2, 6, 3, 7);
        *(Four *)to = SHUFFLE(ab, ce, 0, 1, 4, 5);
        *(Four *)(to + PANEL) = SHUFFLE(ab, ce, 2, 3, 6, 7);
        *(Four *)(to + 2 * PANEL) = SHUFFLE(AB, CE, 0, 1, 4, 5);
        *(Four *)(to + 3 * PANEL) = SHUFFLE(AB, CE, 2, 3, 6, 7);
    }
    for (int64_t d = whole; d < dim; d++, to += PANEL)
        for (int key = 0; key < 4; key++) to[key] = LOAD(from[key * dim + d]);
}

/* Keys and values of a chunk onto the board, asking memory for the next chunk's meanwhile. Slots that no row sees may
 * hold NaN: their scores are never read, their values count as zero. */
static void NAME(unpack)(const Layer *l, const Span *s, const Board *b, int64_t chunk) {
    const int64_t dim = b->dim, first = MAX(chunk, s->first_key), end = MIN(chunk + CHUNK, s->end_key);
    memset(b->values, 0, (size_t)((first - chunk) * b->width) * sizeof(float));
    for (int64_t key = first / 4 * 4; key < end; key += 4) {
        const int64_t column = key - chunk, after = key + CHUNK < s->end_key ? key + CHUNK : key;
        const NUMBER *keys = NAME(key_at)(l, s, key), *next_keys = NAME(key_at)(l, s, after);
        const NUMBER *values = keys + l->value_offset, *next_values = next_keys + l->value_offset;
        NAME(turn_keys)(keys, dim, b->keys + column / PANEL * PANEL * dim + column % PANEL);
        for (int64_t i = 0; i < 4; i++) {
            for (int64_t d = 0; d < dim; d += 64 / (int64_t)sizeof(NUMBER)) {
                __builtin_prefetch(next_keys + i * dim + d, 0, 2);
                __builtin_prefetch(next_values + i * dim + d, 0, 2);
            }
            if (key + i < first || key + i >= end) continue;
            float *restrict to = b->values + (column + i) * b->width;
            const NUMBER *restrict value = values + i * dim;
            for (int64_t d = 0; d < dim; d++) to[d] = LOAD(value[d]);
        }
    }
}

/* Whether the values of keys [from, to) are finite: adding one to the lowest bit of an exponent carries into the sign
 * only where all its bits are set. */
static int NAME(finite)(const Layer *l, const Span *s, int64_t from, int64_t to) {
    uint64_t carried = 0;
    for (int64_t key = from; key < to;) { /* block by block: within one, values lie side by side */
        const int64_t count = MIN(to - key, l->block_size - key % l->block_size);
        const char *values = (const char *)(NAME(key_at)(l, s, key) + l->value_offset);
        const int64_t bytes = count * l->head_dim * (int64_t)sizeof(NUMBER);
        for (int64_t i = 0; i < bytes / 8; i++) {
            uint64_t word;
            memcpy(&word, values + i * 8, 8);
            carried |= (word & EXPONENTS) + LOWEST;
        }
        uint64_t last = 0;
        memcpy(&last, values + bytes / 8 * 8, (size_t)(bytes % 8));
        carried |= (last & EXPONENTS) + LOWEST;
        key += count;
    }
    return !(carried & SIGNS);
}

static void NAME(load_queries)(const Call *c, const Task *t, const Span *s, const Board *b) {
    const float scale = (float)(c->layer->scale * 1.4426950408889634);
    for (int64_t i = 0; i < b->rows; i++) {
        const int64_t row = t->first + i, token = s->start + row / s->group, head = t->head * s->group + row % s->group;
        const NUMBER *restrict q = (const NUMBER *)c->q + token * c->q_stride + head * b->dim;
        float *restrict to = b->queries + i * b->dim;
        for (int64_t d = 0; d < b->dim; d++) to[d] = LOAD(q[d]) * scale;
    }
}

static void NAME(write_out)(const Call *c, const Task *t, const Span *s, const Board *b) {
    for (int64_t i = 0; i < b->rows; i++) {
        const int64_t row = t->first + i, token = s->start + row / s->group, head = t->head * s->group + row % s->group;
        NUMBER *restrict to = (NUMBER *)c->out + (token * c->layer->num_heads + head) * b->dim;
        const float *restrict out = b->out + i * b->width;
        const float sum = sum_of(b, i);
        for (int64_t d = 0; d < b->dim; d++) to[d] = STORE(out[d] / sum);
    }
}

static void NAME(attend)(const Call *c, const Task *t) {
    const Layer *l = c->layer;
    const Span s = span_of(c, t, sizeof(NUMBER));
    const Board b = lay_board(t->last - t->first, l->head_dim);
    NAME(load_queries)(c, t, &s, &b);
    for (int64_t chunk = s.first_key / CHUNK * CHUNK; chunk < s.end_key; chunk += CHUNK) {
        NAME(unpack)(l, &s, &b, chunk);
        for (int64_t row = 0; row < b.rows; row += ROWS) {
            const int64_t rows = MIN(ROWS, b.rows - row);
            int64_t from[ROWS], to[ROWS];
            for (int64_t i = 0; i < rows; i++) {
                const int64_t position = s.positions[(t->first + row + i) / s.group] - chunk;
                from[i] = l->window ? MAX(0, position - l->window + 1) : 0;
                to[i] = MIN(CHUNK, position + 1);
            }
            if (from[0] < CHUNK && to[rows - 1] > 0) attend_rows(&b, row, rows, from, to);
        }
    }
    NAME(write_out)(c, t, &s, &b);
}

#undef NUMBER
#undef EXPONENTS
#undef LOWEST
#undef SIGNS
#undef LOAD
#undef STORE
#undef NAME
#ifdef ROTATE16
#undef ROTATE16
#endif
