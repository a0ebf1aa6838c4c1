/* Sums of products in vector registers, for processors without AMX and for whoever leaves its tiles alone: up to MOST_ROWS
 * rows by 32 outputs at a time, all of whose sums stay in registers. Part of linear.h, which says what is multiplied with
 * what, and when.
 *
 * Weights are widened to fp32 as they are read, inputs before: two FMA a cycle are as many products as VDPBF16PS has where
 * it is quick, and four times as many where it takes two cycles.
 */
#pragma once

#define MOST_ROWS 12 /* two sums a row, two pairs of weights: 28 of 32 registers */

/* A unit's weights `b` times rows of x, `stride` numbers apart, to sums [rows, 32]. */
typedef void SumRows(const bf16 *b, int64_t steps, const float *x, int64_t stride, float *sums, int first_use,
                     Ahead *ahead);

static inline __m512 low_half(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

static inline __m512 high_half(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int32_t)0xffff0000)));
}

static inline __attribute__((always_inline)) void sum_rows(const bf16 *b, int64_t steps, const float *x, int64_t stride,
                                                           float *sums, int first_use, Ahead *ahead, const int rows) {
    __m512 left[MOST_ROWS], right[MOST_ROWS];
    for (int i = 0; i < rows; i++) left[i] = right[i] = _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; step++, b += 1024, x += 32) {
        if (first_use) prefetch_step(b);
        else if (ahead) prefetch_ahead(ahead);
        for (int pair = 0; pair < 16; pair++) {
            const __m512i a = _mm512_load_si512(b + pair * 32), c = _mm512_load_si512(b + 512 + pair * 32);
            const __m512 a0 = low_half(a), a1 = high_half(a), c0 = low_half(c), c1 = high_half(c);
#pragma GCC unroll 12
            for (int i = 0; i < rows; i++) {
                const __m512 x0 = _mm512_set1_ps(x[i * stride + pair * 2]), x1 = _mm512_set1_ps(x[i * stride + pair * 2 + 1]);
                left[i] = _mm512_fmadd_ps(x1, a1, _mm512_fmadd_ps(x0, a0, left[i]));
                right[i] = _mm512_fmadd_ps(x1, c1, _mm512_fmadd_ps(x0, c0, right[i]));
            }
        }
    }
    for (int i = 0; i < rows; i++) {
        _mm512_store_ps(sums + i * 32, left[i]);
        _mm512_store_ps(sums + i * 32 + 16, right[i]);
    }
}

#define SUM_ROWS(rows)                                                                                            \
    static void sum_##rows(const bf16 *b, int64_t steps, const float *x, int64_t stride, float *sums, int first_use, \
                           Ahead *ahead) {                                                                        \
        sum_rows(b, steps, x, stride, sums, first_use, ahead, rows);                                              \
    }
SUM_ROWS(1)
SUM_ROWS(2)
SUM_ROWS(3)
SUM_ROWS(4)
SUM_ROWS(5)
SUM_ROWS(6)
SUM_ROWS(7)
SUM_ROWS(8)
SUM_ROWS(9)
SUM_ROWS(10)
SUM_ROWS(11)
SUM_ROWS(12)

static SumRows *const sums_of[MOST_ROWS + 1] = {NULL,  sum_1, sum_2, sum_3,  sum_4,  sum_5, sum_6,
                                                sum_7, sum_8, sum_9, sum_10, sum_11, sum_12};

/* Rows of x, `stride` elements apart, as fp32 [count, width]; `width` is a multiple of 32. */
static float *widen(const bf16 *x, int64_t stride, int64_t count, int64_t width) {
    float *wide = scratch((size_t)(count * width) * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < width; k += 16)
            _mm512_store_ps(wide + i * width + k, load_bf16(x + i * stride + k, 0xffff));
    return wide;
}

/* `count` <= 32 rows of x from `row` on times units [first, last). The rows of a unit share it in equal parts while it is
 * in the first-level cache. */
static void multiply_vectors(const Product *p, const bf16 *x, int64_t stride, int64_t row, int64_t count, int64_t first,
                             int64_t last, int first_use, Ahead *ahead) {
    float sums[1024] __attribute__((aligned(64)));
    const int64_t width = p->steps * 32;
    const float *wide = widen(x + row * stride, stride, count, width);
    const bf16 *b = p->w->weight + first * p->steps * 1024;
    for (int64_t unit = first; unit < last; unit++, b += p->steps * 1024) {
        prefetch_outputs(p, p->mode, unit, row, count);
        for (int64_t done = 0, passes = CEIL_DIV(count, MOST_ROWS); passes; passes--) {
            const int64_t rows = CEIL_DIV(count - done, passes);
            const float *from = wide + done * width;
            sums_of[rows](b, p->steps, from, width, sums + done * 32, first_use && !done, done ? NULL : ahead);
            done += rows;
        }
        Pending sum = pending(p, unit, row, count, sums);
        if (p->mode == OUT_GATED) write_sums(p, OUT_GATED, &sum, count);
        else if (p->mode == OUT_BF16) write_sums(p, OUT_BF16, &sum, count);
        else if (p->mode == OUT_ADDED) write_sums(p, OUT_ADDED, &sum, count);
        else write_sums(p, OUT_F32, &sum, count);
    }
}
