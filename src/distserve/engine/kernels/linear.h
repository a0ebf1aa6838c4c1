/* Matrix products with packed weights, and the gather of embedding rows out of the packed form. The sums themselves are
 * made on AMX tiles (linear_amx.h) or in vector registers (linear_vectors.h).
 *
 * Packed weight: [units][steps][2][16][16][2]. A unit is 32 outputs, a step is 32 inputs; within a step lie two 1 KB
 * tiles of 16 outputs, each 16 rows of input pairs: what TDPBF16PS wants as its B operand, and vector units row by row,
 * so that a matrix product reads its weights in one straight line. Plain: output n is tile (n / 16) % 2 of unit n / 32.
 * Gated: a unit holds 16 gate outputs and the 16 up outputs that belong to them. The edges are padded with zeros.
 *
 * Each output is one chain of fp32 accumulations over the inputs in order, whatever the number of rows, so a row's
 * result does not depend on the batch around it.
 */
#pragma once

#include "common.h"

enum { OUT_BF16 = 0, OUT_F32 = 1, OUT_GATED = 2, OUT_ADDED = 3 }; /* ADDED: to the fp32 numbers that are there */

typedef struct {
    const bf16 *weight; /* packed */
    const bf16 *bias;   /* [num_outputs] or NULL; gated: gate then up */
    int64_t num_outputs, num_inputs; /* of the unpacked weight */
    int64_t gated;
} Packed;

static inline int64_t packed_units(const Packed *w) {
    return w->gated ? CEIL_DIV(w->num_outputs / 2, 16) : CEIL_DIV(w->num_outputs, 32);
}

/* Row-major [num_outputs, num_inputs] -> packed. */
EXPORT void ds_pack(const Packed *shape, const bf16 *weight, bf16 *packed) {
    const int64_t steps = CEIL_DIV(shape->num_inputs, 32), units = packed_units(shape), half = shape->num_outputs / 2;
    for (int64_t i = 0; i < units * 2 * steps * 16; i++) {
        const int64_t column = i % 16, tile = i / 16 % 2, step = i / 32 % steps, unit = i / 32 / steps;
        int64_t output = unit * 32 + tile * 16 + column, end = shape->num_outputs;
        if (shape->gated) {
            output = tile * half + unit * 16 + column;
            end = tile ? 2 * half : half;
        }
        bf16 *to = packed + ((unit * steps + step) * 2 + tile) * 512 + column * 2;
        for (int64_t k = 0; k < 32; k++) {
            const int64_t input = step * 32 + k;
            const int inside = output < end && input < shape->num_inputs;
            to[k / 2 * 32 + k % 2] = inside ? weight[output * shape->num_inputs + input] : 0;
        }
    }
}

/* Rows `ids` of a plain packed weight -> out [count, num_inputs]. Returns 1 when an id is not a row. */
EXPORT int64_t ds_gather(const Packed *w, const int64_t *ids, int64_t count, bf16 *out) {
    const int64_t steps = CEIL_DIV(w->num_inputs, 32);
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= w->num_outputs) return 1;
        const bf16 *from = w->weight + ids[i] / 32 * steps * 1024 + ids[i] / 16 % 2 * 512 + ids[i] % 16 * 2;
        for (int64_t k = 0; k < w->num_inputs; k++)
            out[i * w->num_inputs + k] = from[k / 32 * 1024 + k % 32 / 2 * 32 + k % 2];
    }
    return 0;
}

#ifdef HAVE_BF16_VECTORS

/* Rows of x are multiplied with all weights before the next ones, and with a group of units before the next group: so
 * many bytes of each stay in the second-level cache, next to the following group, and outputs are written some hundred
 * bytes side by side. */
#define CACHED_ROWS (640 << 10)
#define CACHED_UNITS (256 << 10)

/* Prefetching a straight line of memory page after page keeps one hardware stream busy; eight pages at once keep eight,
 * and read 1.5 times as fast. So the next 32 KB are asked for, sixteen lines of each page in turn, while these are used.
 * Past the end of a weight lies the next layer's: the arena packs them side by side. */
#define GROUP 32768
#define PAGES 8

/* Always inline: gcc takes a function that only prefetches for one without effect, and drops calls of it. */
static inline __attribute__((always_inline)) void prefetch_step(const bf16 *at) {
    const uintptr_t here = (uintptr_t)at, group = here / GROUP * GROUP + GROUP;
    const uintptr_t line = here % GROUP / 64 / PAGES * 64; /* this step's 2 KB are lines 8 n to 8 n + 31 of the group */
    for (uintptr_t i = 0; i < 4; i++)
        for (uintptr_t page = 0; page < PAGES; page++)
            _mm_prefetch((const char *)(group + page * 4096 + line + i * 64), _MM_HINT_T0);
}

/* Many rows use a group of units many times: meanwhile the next group is asked for, `lines` at every step. */
typedef struct {
    const char *next;
    int64_t lines;
} Ahead;

static inline __attribute__((always_inline)) void prefetch_ahead(Ahead *ahead) {
    for (int64_t i = 0; i < ahead->lines; i++, ahead->next += 64) _mm_prefetch(ahead->next, _MM_HINT_T1);
}

typedef struct {
    const Packed *w;
    int64_t steps;
    void *out;
    int64_t mode, out_stride; /* in elements */
} Product;

/* A block of sums, [rows][32], on its way through the epilogue. */
typedef struct {
    const float *sums;
    int64_t rows, written, at; /* `at`: where the next row goes, in elements */
    __mmask16 mask0, mask1;
    __m512 bias0, bias1;
} Pending;

static inline __mmask16 lanes(int64_t count) { return (__mmask16)(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1); }

/* The sums of `rows` rows from `row` on and one unit, not written yet. */
static inline Pending pending(const Product *p, int64_t unit, int64_t row, int64_t rows, const float *sums) {
    const Packed *w = p->w;
    const int64_t width = w->gated ? w->num_outputs / 2 : w->num_outputs;
    const int64_t first = w->gated ? unit * 16 : unit * 32;
    Pending n = {.sums = sums, .rows = rows, .at = row * p->out_stride + first, .mask0 = lanes(width - first)};
    n.mask1 = w->gated ? n.mask0 : lanes(width - first - 16);
    n.bias0 = n.bias1 = _mm512_setzero_ps();
    if (w->bias) {
        n.bias0 = load_bf16(w->bias + first, n.mask0);
        n.bias1 = load_bf16(w->bias + first + (w->gated ? width : 16), n.mask1);
    }
    return n;
}

/* The next rows of sums, to `end`, plus bias, through the epilogue, to the output. */
static inline __attribute__((always_inline)) void write_sums(const Product *p, int64_t mode, Pending *n, int64_t end) {
    for (end = MIN(end, n->rows); n->written < end; n->written++, n->at += p->out_stride) {
        const float *sums = n->sums + n->written * 32;
        const __m512 a = _mm512_add_ps(_mm512_load_ps(sums), n->bias0);
        const __m512 b = _mm512_add_ps(_mm512_load_ps(sums + 16), n->bias1);
        if (mode == OUT_GATED) {
            const __m256bh y = _mm512_cvtneps_pbh(_mm512_mul_ps(silu_16(a), b));
            _mm256_mask_storeu_epi16((bf16 *)p->out + n->at, n->mask0, (__m256i)y);
        } else if (mode == OUT_BF16) {
            const __m512i y = (__m512i)_mm512_cvtne2ps_pbh(b, a);
            _mm512_mask_storeu_epi16((bf16 *)p->out + n->at, (__mmask32)n->mask0 | (__mmask32)n->mask1 << 16, y);
        } else {
            float *to = (float *)p->out + n->at;
            const int added = mode == OUT_ADDED;
            const __m512 x = added ? _mm512_add_ps(_mm512_maskz_loadu_ps(n->mask0, to), a) : a;
            const __m512 y = added ? _mm512_add_ps(_mm512_maskz_loadu_ps(n->mask1, to + 16), b) : b;
            _mm512_mask_storeu_ps(to, n->mask0, x);
            _mm512_mask_storeu_ps(to + 16, n->mask1, y);
        }
    }
}

/* Asks for the lines that these rows of a unit's outputs will be written to: stores wait for them one by one. */
static inline __attribute__((always_inline)) void prefetch_outputs(const Product *p, int64_t mode, int64_t unit,
                                                                   int64_t row, int64_t count) {
    const int64_t itemsize = mode == OUT_F32 || mode == OUT_ADDED ? 4 : 2, first = unit * (mode == OUT_GATED ? 16 : 32);
    const char *at = (const char *)p->out + (row * p->out_stride + first) * itemsize;
    for (int64_t i = 0; i < count; i++, at += p->out_stride * itemsize) __builtin_prefetch(at, 1);
}

#ifdef HAVE_AMX
#include "linear_amx.h"
#endif
#include "linear_vectors.h"

/* Before `multiply` is called with `count` rows, as often as wanted; after the last call. */
static inline void begin_rows(int64_t count) {
#ifdef HAVE_AMX
    if (tiles_allowed) configure_product((int)MIN(count, 16), (int)MAX(count - 16, 1));
#else
    (void)count;
#endif
}

static inline void end_rows(void) {
#ifdef HAVE_AMX
    if (tiles_allowed) _tile_release();
#endif
}

/* `count` <= 32 rows of x from `row` on times units [first, last). Each form of the epilogue is compiled for itself. */
static void multiply(const Product *p, const bf16 *x, int64_t stride, int64_t row, int64_t count, int64_t first,
                     int64_t last, int first_use, Ahead *ahead) {
#ifdef HAVE_AMX
    if (tiles_allowed) {
        if (p->mode == OUT_GATED) multiply_tiles(p, OUT_GATED, x, stride, row, count, first, last, first_use, ahead);
        else if (p->mode == OUT_BF16) multiply_tiles(p, OUT_BF16, x, stride, row, count, first, last, first_use, ahead);
        else if (p->mode == OUT_ADDED)
            multiply_tiles(p, OUT_ADDED, x, stride, row, count, first, last, first_use, ahead);
        else multiply_tiles(p, OUT_F32, x, stride, row, count, first, last, first_use, ahead);
        return;
    }
#endif
    multiply_vectors(p, x, stride, row, count, first, last, first_use, ahead);
}

/* Rows [row, row + rows) of x times units [first, last). What is left of the rows after the last 32 uses each group of
 * units right after the others, while it is near: in a pass of its own it would read all weights from memory again. */
static void multiply_block(const Product *p, const bf16 *x, int64_t stride, int64_t row, int64_t rows, int64_t first,
                           int64_t last) {
    const int64_t whole = rows / 32 * 32, rest = rows - whole;
    const int64_t group = whole ? MAX(1, CACHED_UNITS / (p->steps * 2048)) : last - first;
    for (int64_t unit = first; unit < last; unit += group) {
        const int64_t end = MIN(unit + group, last);
        if (whole) {
            if (rest || unit == first) begin_rows(32);
            Ahead ahead = {(const char *)(p->w->weight + end * p->steps * 1024), CEIL_DIV(32 * 32, whole)};
            for (int64_t i = 0; i < whole; i += 32)
                multiply(p, x, stride, row + i, 32, unit, end, whole == 32, &ahead);
        }
        if (rest) {
            Ahead ahead = {NULL, 0};
            begin_rows(rest);
            multiply(p, x, stride, row + whole, rest, unit, end, whole == 0, &ahead);
        }
    }
}

/* x [rows, num_inputs] -> out [rows, num_outputs] (gated: [rows, num_outputs / 2]); rows `stride`, `out_stride` elements
 * apart. */
EXPORT void ds_linear(const Packed *w, const bf16 *x, int64_t stride, int64_t rows, void *out, int64_t out_stride,
                      int64_t mode) {
    if (rows <= 0) return;
    const Product product = {w, CEIL_DIV(w->num_inputs, 32), out, mode, out_stride};
    const int64_t units = packed_units(w), blocks = CEIL_DIV(rows * product.steps * 64, CACHED_ROWS);
    const int64_t most = CEIL_DIV(CEIL_DIV(rows, blocks), 32) * 32;
    bf16 *padded = NULL;
    if (w->num_inputs % 32) { /* whole steps are read: the rest of a row must be there, and must be no NaN */
        const int64_t width = product.steps * 32;
        padded = aligned_alloc(64, (size_t)(CEIL_DIV(rows * width * 2, 64) * 64));
        if (!padded) abort();
        for (int64_t i = 0; i < rows; i++) {
            memcpy(padded + i * width, x + i * stride, (size_t)w->num_inputs * 2);
            memset(padded + i * width + w->num_inputs, 0, (size_t)(width - w->num_inputs) * 2);
        }
        x = padded;
        stride = width;
    }
    OMP(omp parallel num_threads(num_threads) if (num_threads > 1)) {
        for (int64_t row = 0; row < rows; row += most) {
            const int64_t count = MIN(most, rows - row);
            int64_t first = 0, last = units;
#ifdef _OPENMP
            const int64_t team = omp_get_num_threads(), member = omp_get_thread_num();
            first = units * member / team;
            last = units * (member + 1) / team;
#endif
            multiply_block(&product, x, stride, row, count, first, last);
        }
        end_rows();
    }
    free(padded);
}

#endif
