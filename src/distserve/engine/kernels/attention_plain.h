/* Rotation, cache writes and attention in plain C, for any head size and any processor. Included once per number format,
 * with NUMBER, LOAD, STORE and NAME defined.
 */

static void NAME(rotate)(NUMBER *restrict x, const float *restrict cosines, const float *restrict sines, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float a = LOAD(x[i]), b = LOAD(x[i + half]);
        x[i] = STORE(a * cosines[i] - b * sines[i]);
        x[i + half] = STORE(b * cosines[i] + a * sines[i]);
    }
}

/* Rotates one token's queries and keys in place, and copies its keys and values to their slot. */
static void NAME(write_token)(const Call *c, int64_t token) {
    const Layer *l = c->layer;
    const int64_t dim = l->head_dim, slot = c->step->slots[token];
    NUMBER *q = (NUMBER *)c->q + token * c->q_stride, *k = (NUMBER *)c->k + token * c->k_stride;
    const NUMBER *v = (const NUMBER *)c->v + token * c->v_stride;
    if (l->cosines) {
        const int64_t at = c->step->positions[token] * (dim / 2);
        for (int64_t head = 0; head < l->num_heads; head++)
            NAME(rotate)(q + head * dim, l->cosines + at, l->sines + at, dim / 2);
        for (int64_t head = 0; head < l->num_kv_heads; head++)
            NAME(rotate)(k + head * dim, l->cosines + at, l->sines + at, dim / 2);
    }
    NUMBER *to = (NUMBER *)l->kv + slot / l->block_size * l->block_stride + slot % l->block_size * dim;
    for (int64_t head = 0; head < l->num_kv_heads; head++) {
        memcpy(to + head * l->head_stride, k + head * dim, (size_t)dim * sizeof(NUMBER));
        memcpy(to + head * l->head_stride + l->value_offset, v + head * dim, (size_t)dim * sizeof(NUMBER));
    }
}

/* a . b with sixteen running sums: the same order whatever the vector width. */
static float NAME(dot)(const float *restrict a, const NUMBER *restrict b, int64_t width) {
    float sums[16] = {0};
    const int64_t whole = width / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] += a[i + lane] * LOAD(b[i + lane]);
    for (int64_t i = whole; i < width; i++) sums[i - whole] += a[i] * LOAD(b[i]);
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    return sums[0];
}

/* One row over one chunk of keys [from, to), all of them seen. state: reference, sum, then the weighted values. */
static void NAME(attend_chunk)(const Layer *l, const Span *s, const float *q, int64_t from, int64_t to,
                               float *restrict state) {
    const int64_t dim = l->head_dim;
    float scores[CHUNK], *restrict values = state + 2, top = NOTHING;
    for (int64_t key = from; key < to; key++) {
        const int64_t at = s->table[key / l->block_size] * l->block_stride + key % l->block_size * dim;
        const float score = NAME(dot)(q, (const NUMBER *)s->keys + at, dim);
        scores[key - from] = score;
        top = MAX(top, score);
    }
    if (top > state[0] + LAZY) {
        const float shrink = exp2_plain(state[0] - top);
        state[0] = top;
        state[1] *= shrink;
        for (int64_t i = 0; i < dim; i++) values[i] *= shrink;
    }
    for (int64_t key = from; key < to; key++) {
        const int64_t at = s->table[key / l->block_size] * l->block_stride + key % l->block_size * dim;
        const NUMBER *restrict value = (const NUMBER *)s->values + at;
        const float p = exp2_plain(scores[key - from] - state[0]);
        state[1] += p;
        for (int64_t i = 0; i < dim; i++) values[i] += p * LOAD(value[i]);
    }
}

static void NAME(attend)(const Call *c, const Task *t) {
    const Layer *l = c->layer;
    const Span s = span_of(c, t, sizeof(NUMBER));
    const int64_t rows = t->last - t->first, dim = l->head_dim, width = 2 * dim + 2;
    const float scale = (float)(l->scale * 1.4426950408889634);
    float *memory = scratch((size_t)(rows * width) * sizeof(float));
    for (int64_t i = 0; i < rows; i++) {
        const int64_t row = t->first + i, token = s.start + row / s.group, head = t->head * s.group + row % s.group;
        const NUMBER *q = (const NUMBER *)c->q + token * c->q_stride + head * dim;
        float *state = memory + i * width;
        memset(state, 0, (size_t)width * sizeof(float));
        state[0] = NOTHING;
        for (int64_t j = 0; j < dim; j++) state[2 + dim + j] = LOAD(q[j]) * scale;
    }
    for (int64_t chunk = s.first_key / CHUNK * CHUNK; chunk < s.end_key; chunk += CHUNK)
        for (int64_t i = 0; i < rows; i++) {
            const int64_t position = s.positions[(t->first + i) / s.group];
            const int64_t from = l->window ? MAX(chunk, position - l->window + 1) : chunk;
            const int64_t to = MIN(chunk + CHUNK, position + 1);
            float *state = memory + i * width;
            if (from < to) NAME(attend_chunk)(l, &s, state + 2 + dim, from, to, state);
        }
    for (int64_t i = 0; i < rows; i++) {
        const int64_t row = t->first + i, token = s.start + row / s.group, head = t->head * s.group + row % s.group;
        NUMBER *to = (NUMBER *)c->out + (token * l->num_heads + head) * dim;
        const float *state = memory + i * width;
        for (int64_t j = 0; j < dim; j++) to[j] = STORE(state[2 + j] / state[1]);
    }
}

#undef NUMBER
#undef LOAD
#undef STORE
#undef NAME
