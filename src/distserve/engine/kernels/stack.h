/* A stack of transformer blocks (pre-norm, rotary attention over the paged cache, gated MLP) in one call, so that nothing
 * but kernels runs between kernels: what a caller does in between finds its own code and data thrown out of the caches.
 *
 * The residual stream is fp32 and is added to where a product's sums are written; no contribution is rounded before. Where
 * several ranks share each layer, the two products that add to the stream are summed over them first.
 */
#pragma once

#include "attention.h"
#include "linear.h"

typedef struct {
    const bf16 *attention_norm, *mlp_norm; /* [width] */
    const Packed *qkv, *out, *gate_up, *down;
    const Layer *attention;
} Block;

/* Makes `values` the sum of those of all ranks. Returns 0, or anything else where it failed. */
typedef int64_t (*Sum)(void *context, float *values, int64_t count);

typedef struct {
    const Block *blocks;
    int64_t num_blocks, width; /* of the residual stream */
    double eps;
    Sum sum; /* NULL: there is one rank */
    void *context;
} Stack;

#ifdef HAVE_BF16_VECTORS

/* Widths of what lies between two products, in elements. */
static inline int64_t attended_width(const Block *b) { return b->attention->num_heads * b->attention->head_dim; }

static inline int64_t align_line(int64_t bytes) { return CEIL_DIV(bytes, 64) * 64; }

/* Bytes of scratch memory for `tokens` tokens. */
EXPORT int64_t ds_stack_bytes(const Stack *s, int64_t tokens) {
    const Block *b = s->blocks;
    return align_line(tokens * s->width * 2) + align_line(tokens * b->qkv->num_outputs * 2) +
           2 * align_line(tokens * attended_width(b) * 2) + align_line(tokens * b->gate_up->num_outputs) +
           (s->sum ? align_line(tokens * s->width * 4) : 0);
}

static void norm_rows(float *x, const bf16 *weight, bf16 *out, int64_t rows, int64_t width, float eps) {
    OMP(omp parallel for num_threads(num_threads) if (num_threads > 1 && rows > 8))
    for (int64_t row = 0; row < rows; row++) normalise_bf16(NULL, x + row * width, weight, out + row * width, width, eps);
}

/* residual += x times w, of all ranks. `term` [rows, width]: this one's. Returns what the sum did. */
static int64_t add_product(const Stack *s, const Packed *w, const bf16 *x, int64_t stride, int64_t rows, float *residual,
                           float *term) {
    if (!s->sum) {
        ds_linear(w, x, stride, rows, residual, s->width, OUT_ADDED);
        return 0;
    }
    ds_linear(w, x, stride, rows, term, s->width, OUT_F32);
    const int64_t failed = rows ? s->sum(s->context, term, rows * s->width) : 0;
    for (int64_t i = 0; i < rows * s->width; i++) residual[i] += term[i];
    return failed;
}

/* `residual` [tokens, width], each block's contributions added. Of the last block only `rows` [count] are finished, which
 * then are the first rows of `finished` [count, width]; without rows all are, in place. `memory`: ds_stack_bytes. Returns
 * 0, or what a sum returned that failed. */
EXPORT int64_t ds_stack(const Stack *s, const Step *step, float *residual, const int64_t *rows, int64_t count,
                     float *finished, char *memory) {
    const int64_t tokens = step->num_tokens, width = s->width, attended = attended_width(s->blocks);
    const int64_t qkv_width = s->blocks->qkv->num_outputs, ffn = s->blocks->gate_up->num_outputs / 2;
    bf16 *normed = take(&memory, tokens * width * 2), *qkv = take(&memory, tokens * qkv_width * 2);
    bf16 *y = take(&memory, tokens * attended * 2), *chosen = take(&memory, tokens * attended * 2);
    bf16 *hidden = take(&memory, tokens * ffn * 2);
    float *term = s->sum ? (float *)take(&memory, tokens * width * 4) : NULL;
    int64_t num_rows = tokens, failed = 0;
    for (const Block *b = s->blocks; b < s->blocks + s->num_blocks && !failed; b++) {
        const Layer *l = b->attention;
        norm_rows(residual, b->attention_norm, normed, tokens, width, (float)s->eps);
        ds_linear(b->qkv, normed, width, tokens, qkv, qkv_width, OUT_BF16);
        char *q = (char *)qkv, *k = q + l->num_heads * l->head_dim * 2, *v = k + l->num_kv_heads * l->head_dim * 2;
        ds_attention(l, step, q, qkv_width, k, qkv_width, v, qkv_width, (char *)y);
        if (rows && b + 1 == s->blocks + s->num_blocks) {
            for (int64_t i = 0; i < count; i++) {
                memcpy(chosen + i * attended, y + rows[i] * attended, (size_t)attended * 2);
                memcpy(finished + i * width, residual + rows[i] * width, (size_t)width * 4);
            }
            y = chosen, residual = finished, num_rows = count;
        }
        if ((failed = add_product(s, b->out, y, attended, num_rows, residual, term))) break;
        norm_rows(residual, b->mlp_norm, normed, num_rows, width, (float)s->eps);
        ds_linear(b->gate_up, normed, width, num_rows, hidden, ffn, OUT_GATED);
        failed = add_product(s, b->down, hidden, ffn, num_rows, residual, term);
    }
    return failed;
}

#endif
