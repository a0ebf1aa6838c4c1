/* Row-wise kernels in plain C that compilers turn into vector code: norms, activation. Included once per number format,
 * with NUMBER, LOAD, STORE and NAME defined. Sixteen running sums make the order of additions, and so the result,
 * independent of the compiler's choice of vector width.
 */

/* One row: to = from over its root mean square, times weight; in fp32, rounded once to the number format. */
static inline void NAME(normalise)(const float *restrict from, const NUMBER *restrict weight, NUMBER *restrict to,
                                   int64_t width, float eps) {
    float sums[16] = {0};
    const int64_t whole = width / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] += from[i + lane] * from[i + lane];
    for (int64_t i = whole; i < width; i++) sums[i - whole] += from[i] * from[i];
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    const float scale = 1.0f / sqrtf(sums[0] / (float)width + eps);
    for (int64_t i = 0; i < width; i++) to[i] = STORE(from[i] * scale * LOAD(weight[i]));
}

/* x [rows, width] -> out, normalised and weighted. With a residual, which is always fp32: of residual += x. */
EXPORT void NAME(ds_rms_norm)(const NUMBER *restrict x, float *restrict residual, const NUMBER *restrict weight,
                              NUMBER *restrict out, int64_t rows, int64_t width, float eps) {
    OMP(omp parallel for num_threads(num_threads) if (num_threads > 1 && rows > 8))
    for (int64_t row = 0; row < rows; row++) {
        const NUMBER *from = x + row * width;
        float plain[residual ? 1 : width];
        float *wide = residual ? residual + row * width : plain;
        if (residual)
            for (int64_t i = 0; i < width; i++) wide[i] += LOAD(from[i]);
        else
            for (int64_t i = 0; i < width; i++) wide[i] = LOAD(from[i]);
        NAME(normalise)(wide, weight, out + row * width, width, eps);
    }
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
