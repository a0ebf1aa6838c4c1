/* Row-wise kernels: norms, activation. Included once per number format, with NUMBER, LOAD, STORE and NAME defined, and
 * LOAD16 and STORE16 for processors with AVX512-BF16; plain C elsewhere, which compilers vectorise. Sixteen running sums
 * make the order of additions, and so the result, independent of the compiler's choice of vector width.
 */

#ifdef HAVE_BF16_VECTORS

/* One row: to = x (with a residual: of residual += x; with a residual and no x: of the residual) over its root mean
 * square, times weight. */
static inline void NAME(normalise)(const NUMBER *x, float *residual, const NUMBER *weight, NUMBER *to, int64_t width,
                                   float eps) {
    float sums[16], plain[residual ? 1 : width], *wide = residual ? residual : plain;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 inside = (__mmask16)(width - i < 16 ? (1 << (width - i)) - 1 : 0xffff);
        __m512 number = residual ? _mm512_maskz_loadu_ps(inside, residual + i) : LOAD16(x + i, inside);
        if (residual && x) number = _mm512_add_ps(number, LOAD16(x + i, inside));
        if (x) _mm512_mask_storeu_ps(wide + i, inside, number);
        squares = _mm512_fmadd_ps(number, number, squares);
    }
    _mm512_storeu_ps(sums, squares);
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(sums[0] / (float)width + eps));
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 inside = (__mmask16)(width - i < 16 ? (1 << (width - i)) - 1 : 0xffff);
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(inside, wide + i), scale);
        STORE16(to + i, inside, _mm512_mul_ps(scaled, LOAD16(weight + i, inside)));
    }
}

#else

/* One row: to = x (with a residual: of residual += x) over its root mean square, times weight. */
static inline void NAME(normalise)(const NUMBER *restrict x, float *restrict residual, const NUMBER *restrict weight,
                                   NUMBER *restrict to, int64_t width, float eps) {
    float sums[16] = {0}, plain[residual ? 1 : width], *restrict wide = residual ? residual : plain;
    const int64_t whole = width / 16 * 16;
    for (int64_t i = 0; i < width; i++) wide[i] = residual ? wide[i] + LOAD(x[i]) : LOAD(x[i]);
    for (int64_t i = 0; i < whole; i += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] += wide[i + lane] * wide[i + lane];
    for (int64_t i = whole; i < width; i++) sums[i - whole] += wide[i] * wide[i];
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    const float scale = 1.0f / sqrtf(sums[0] / (float)width + eps);
    for (int64_t i = 0; i < width; i++) to[i] = STORE(wide[i] * scale * LOAD(weight[i]));
}

#endif

/* x [rows, width] -> out, normalised and weighted; computed in fp32, rounded once to the number format. With a residual,
 * which is always fp32: of residual += x. */
EXPORT void NAME(ds_rms_norm)(const NUMBER *x, float *residual, const NUMBER *weight, NUMBER *out, int64_t rows,
                              int64_t width, float eps) {
    OMP(omp parallel for num_threads(num_threads) if (num_threads > 1 && rows > 8))
    for (int64_t row = 0; row < rows; row++)
        NAME(normalise)(x + row * width, residual ? residual + row * width : NULL, weight, out + row * width, width, eps);
}

/* x [rows, 2 width] -> silu(first half) * second half [rows, width]. */
EXPORT void NAME(ds_silu_mul)(const NUMBER *restrict x, NUMBER *restrict out, int64_t rows, int64_t width) {
    OMP(omp parallel for num_threads(num_threads) if (num_threads > 1 && rows > 8))
    for (int64_t row = 0; row < rows; row++) {
        const NUMBER *gate = x + row * 2 * width, *up = gate + width;
        NUMBER *to = out + row * width;
        for (int64_t i = 0; i < width; i++) {
            const float g = LOAD(gate[i]);
            to[i] = STORE(g / (1.0f + exp2_plain(-1.44269504f * g)) * LOAD(up[i]));
        }
    }
}

#undef NUMBER
#undef LOAD
#undef STORE
#undef NAME
#undef LOAD16
#undef STORE16
