/* The arithmetic of plain attention: fp32, for any processor, on a chunk of keys and values that was unpacked from the
 * cache. Knows no paging; of number formats only how four of each are loaded. The vectors are the compiler's own (GCC
 * and clang), as wide as a register of the target; intrinsics are not used.
 *
 * A chunk serves all rows of a task, ROWS of them at a time. Scores have keys in the lanes, so keys come transposed, in
 * panels; sums over values have dimensions in the lanes:
 *
 *     scores [ROWS, keys] = Q [ROWS, dim] . keys [dim, keys]     out [ROWS, dim] += 2^(scores - reference) . values
 *
 * Each number is one running sum in the order of its terms, whatever the tile it is computed in: a row's result does
 * not depend on its neighbours. Keys that a row does not see have weight 0, which changes no sum.
 */
#pragma once

#include "common.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

/* A tile of sums is ROWS x VECTORS registers: 24 of 32, or 12 of 16. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define VECTORS 4
#else
#define VECTORS 2
#endif
#define ROWS 6
#define PANEL (LANES * VECTORS)

#define UNSEEN -1e30f /* a score whose weight is 0 */

#define INLINE static inline __attribute__((always_inline))

typedef float Numbers __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t Bits __attribute__((vector_size(LANES * 4), may_alias));
typedef float Four __attribute__((vector_size(16), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE16 SHUFFLE
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){__VA_ARGS__})
#define SHUFFLE16(a, b, ...) __builtin_shuffle(a, b, (int16_t __attribute__((vector_size(16)))){__VA_ARGS__})
#endif

/* A task's memory. `width`: dim rounded up to whole vectors. */
typedef struct {
    int64_t rows, dim, width;
    float *queries;    /* [rows, dim], scaled */
    float *keys;       /* [CHUNK / PANEL, dim, PANEL] */
    float *values;     /* [CHUNK, width] */
    float *scores;     /* [ROWS, CHUNK], then the weights */
    float *out;        /* [rows, width], sums of weighted values */
    float *sums;       /* [rows, LANES], of weights */
    float *references; /* [rows] */
} Board;

static float *take_floats(float **at, int64_t count) {
    float *taken = *at;
    *at += CEIL_DIV(count, 16) * 16;
    return taken;
}

static Board lay_board(int64_t rows, int64_t dim) {
    const int64_t width = CEIL_DIV(dim, LANES) * LANES;
    const int64_t count = rows * (dim + width + LANES + 1) + CHUNK * (dim + width + ROWS) + 7 * 16;
    float *at = scratch((size_t)count * sizeof(float));
    Board b = {.rows = rows, .dim = dim, .width = width};
    b.queries = take_floats(&at, rows * dim);
    b.keys = take_floats(&at, CHUNK * dim);
    b.values = take_floats(&at, CHUNK * width);
    b.scores = take_floats(&at, CHUNK * ROWS);
    b.out = take_floats(&at, rows * width);
    b.sums = take_floats(&at, rows * LANES);
    b.references = take_floats(&at, rows);
    memset(b.out, 0, (size_t)(rows * width) * sizeof(float));
    memset(b.sums, 0, (size_t)(rows * LANES) * sizeof(float));
    for (int64_t row = 0; row < rows; row++) b.references[row] = NOTHING;
    return b;
}

/* 2^x as exp2_plain, for x below 127: adding a large number leaves the whole part, biased, in the low bits. */
INLINE Numbers exp2_lanes(Numbers x) {
    const float shift = 12582912.0f + 127.0f;
    const Numbers moved = x + shift, part = x - (moved - shift);
    Numbers p = part * 0.00132764718f + 0.00967554133f;
    p = p * part + 0.0555071327f;
    p = p * part + 0.240221197f;
    p = p * part + 0.693146967f;
    p = p * part + 1.00000007f;
    p *= (Numbers)((Bits)moved << 23);
    return (Numbers)((Bits)p & ~(Bits)(x < -126.0f)); /* NaN stays NaN */
}

INLINE Numbers larger(Numbers a, Numbers b) {
    const Bits first = (Bits)(a > b);
    return (Numbers)((first & (Bits)a) | (~first & (Bits)b));
}

/* scores [rows, PANEL] of one panel of keys */
INLINE void keys_tile(const Board *b, const float *q, const float *keys, float *scores, int rows) {
    Numbers sums[ROWS][VECTORS] = {0};
    for (int64_t d = 0; d < b->dim; d++, keys += PANEL)
        for (int row = 0; row < rows; row++)
            for (int v = 0; v < VECTORS; v++)
                sums[row][v] += *(const Numbers *)(keys + v * LANES) * q[row * b->dim + d];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < VECTORS; v++) *(Numbers *)(scores + row * CHUNK + v * LANES) = sums[row][v];
}

/* out [rows, vectors * LANES] += weights [rows, count] . values [count, vectors * LANES] */
INLINE void values_tile(const Board *b, const float *values, int64_t count, float *out, int rows, int vectors) {
    Numbers sums[ROWS][VECTORS];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) sums[row][v] = *(const Numbers *)(out + row * b->width + v * LANES);
    for (int64_t key = 0; key < count; key++, values += b->width)
        for (int row = 0; row < rows; row++)
            for (int v = 0; v < vectors; v++)
                sums[row][v] += *(const Numbers *)(values + v * LANES) * b->scores[row * CHUNK + key];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) *(Numbers *)(out + row * b->width + v * LANES) = sums[row][v];
}

INLINE void keys_all(const Board *b, int64_t row, int64_t count, int rows) {
    for (int64_t key = 0; key < count; key += PANEL)
        keys_tile(b, b->queries + row * b->dim, b->keys + key * b->dim, b->scores + key, rows);
}

INLINE void values_all(const Board *b, int64_t row, int64_t count, int rows) {
    float *out = b->out + row * b->width;
    int64_t d = 0;
    for (; d + PANEL <= b->width; d += PANEL) values_tile(b, b->values + d, count, out + d, rows, VECTORS);
    for (; d < b->width; d += LANES) values_tile(b, b->values + d, count, out + d, rows, 1);
}

/* One form for each number of rows, so that the compiler keeps the sums in registers. */
#define EACH_ROWS(rows, form, ...)                \
    switch (rows) {                               \
    case 1: form(__VA_ARGS__, 1); break;          \
    case 2: form(__VA_ARGS__, 2); break;          \
    case 3: form(__VA_ARGS__, 3); break;          \
    case 4: form(__VA_ARGS__, 4); break;          \
    case 5: form(__VA_ARGS__, 5); break;          \
    default: form(__VA_ARGS__, ROWS);             \
    }

static void times_keys(const Board *b, int64_t row, int64_t count, int64_t rows) {
    EACH_ROWS(rows, keys_all, b, row, count)
}

static void times_values(const Board *b, int64_t row, int64_t count, int64_t rows) {
    EACH_ROWS(rows, values_all, b, row, count)
}

/* Scores [count] of one row, who sees keys [from, to) of the chunk, into weights; count: whole vectors. */
static void weigh(const Board *b, int64_t row, float *scores, int64_t from, int64_t to, int64_t count) {
    if (from >= to) {
        memset(scores, 0, (size_t)count * sizeof(float));
        return;
    }
    for (int64_t key = 0; key < from; key++) scores[key] = UNSEEN;
    for (int64_t key = to; key < count; key++) scores[key] = UNSEEN;
    Numbers top = *(const Numbers *)scores;
    for (int64_t key = LANES; key < count; key += LANES) top = larger(top, *(const Numbers *)(scores + key));
    float highest = top[0];
    for (int lane = 1; lane < LANES; lane++) highest = MAX(highest, top[lane]);
    Numbers sums = *(const Numbers *)(b->sums + row * LANES), *out = (Numbers *)(b->out + row * b->width);
    if (highest > b->references[row] + LAZY) {
        const float shrink = exp2_plain(b->references[row] - highest);
        b->references[row] = highest;
        sums *= shrink;
        for (int64_t i = 0; i < b->width / LANES; i++) out[i] *= shrink;
    }
    const float reference = b->references[row];
    for (int64_t key = 0; key < count; key += LANES) {
        const Numbers weights = exp2_lanes(*(const Numbers *)(scores + key) - reference);
        *(Numbers *)(scores + key) = weights;
        sums += weights;
    }
    *(Numbers *)(b->sums + row * LANES) = sums;
}

/* ROWS rows over the chunk on the board: row i sees keys [from[i], to[i]) of it. */
static void attend_rows(const Board *b, int64_t row, int64_t rows, const int64_t *from, const int64_t *to) {
    const int64_t seen = to[rows - 1], count = CEIL_DIV(seen, LANES) * LANES; /* a later row sees further */
    times_keys(b, row, count, rows);
    for (int64_t i = 0; i < rows; i++) weigh(b, row + i, b->scores + i * CHUNK, from[i], to[i], count);
    times_values(b, row, seen, rows);
}

static float sum_of(const Board *b, int64_t row) {
    const Numbers lanes = *(const Numbers *)(b->sums + row * LANES);
    float sum = lanes[0];
    for (int lane = 1; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

/* Four numbers that may lie anywhere. */
static inline Four load_four_f32(const float *from) {
    Four four;
    memcpy(&four, from, sizeof(four));
    return four;
}

/* A bf16 number is the upper half of a float: zeros go below it (little-endian). */
static inline Four load_four_bf16(const bf16 *from) {
    typedef uint16_t Halves __attribute__((vector_size(16)));
    typedef uint64_t Pair __attribute__((vector_size(16)));
    uint64_t four;
    memcpy(&four, from, sizeof(four));
    return (Four)SHUFFLE16((Halves){0}, (Halves)(Pair){four, 0}, 0, 8, 1, 9, 2, 10, 3, 11);
}
