/* What every kernel shares: number formats, thread count, scratch memory, AMX permission and small vector helpers.
 *
 * HAVE_BF16_VECTORS and HAVE_AMX are questions to the compiler (-march=native on a machine with AVX512-BF16, and AMX);
 * whether the operating system lets this process use the tiles is asked once at run time (ds_init).
 */
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_BF16_VECTORS 1
#include <immintrin.h>
#endif

#if defined(HAVE_BF16_VECTORS) && defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef _OPENMP
#define OMP(text) _Pragma(#text)
#else
#define OMP(text)
#endif

#define EXPORT __attribute__((visibility("default")))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))

typedef uint16_t bf16;

enum { DTYPE_F32 = 0, DTYPE_BF16 = 1 };

static int num_threads = 1;
#ifdef HAVE_AMX
static int tiles_allowed; /* by the operating system, and by who started this process */
#endif

static inline float from_bf16(bf16 value) {
    union { uint32_t bits; float number; } u = {(uint32_t)value << 16};
    return u.number;
}

/* Round to nearest even; NaN stays NaN. */
static inline bf16 to_bf16(float value) {
    union { float number; uint32_t bits; } u = {value};
    uint32_t rounded = (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16;
    return (bf16)(value != value ? 0x7fc0 : rounded);
}

/* 2^x in plain C that vectorises, relative error below 2e-7; 0 for very negative x. */
static inline float exp2_plain(float x) {
    const float clamped = x < -126.0f ? -126.0f : x > 127.0f ? 127.0f : x;
    const float whole = rintf(clamped), part = clamped - whole;
    float p = 0.00132764718f;
    p = p * part + 0.00967554133f;
    p = p * part + 0.0555071327f;
    p = p * part + 0.240221197f;
    p = p * part + 0.693146967f;
    p = p * part + 1.00000007f;
    union { int32_t bits; float number; } scale = {((int32_t)whole + 127) << 23};
    return x < -126.0f ? 0.0f : p * scale.number;
}

/* Per-thread scratch, kept between calls and grown on demand; 64-byte aligned. NULL when memory is exhausted. */
static void *scratch(size_t bytes) {
    static _Thread_local void *memory;
    static _Thread_local size_t size;
    if (bytes > size) {
        free(memory);
        size = CEIL_DIV(bytes, 4096) * 4096;
        memory = aligned_alloc(4096, size);
        if (!memory) abort();
    }
    return memory;
}

/* Hands out consecutive pieces of scratch memory, multiples of 64 bytes. */
static inline void *take(char **at, int64_t bytes) {
    void *piece = *at;
    *at += CEIL_DIV(bytes, 64) * 64;
    return piece;
}

#ifdef HAVE_AMX

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* All eight tiles 64 bytes wide; rows[i] rows each. */
static inline void configure_tiles(const uint8_t rows[8]) {
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64;
    memcpy(config.rows, rows, 8);
    _tile_loadconfig(&config);
}

/* Compilers do not know that a tile load reads memory. */
#define BEFORE_TILE_LOAD() __asm__ volatile("" ::: "memory")

#endif

#ifdef HAVE_BF16_VECTORS

/* Sixteen numbers, those outside the mask 0. */
static inline __m512 load_bf16(const bf16 *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

/* `count`, at most sixteen, pairs (x[i], x[half + i]) turned by their angles. */
static inline void rotate_16(const bf16 *x, bf16 *to, const float *cosines, const float *sines, int64_t half,
                             int64_t count) {
    const __mmask16 mask = (__mmask16)(count < 16 ? (1 << count) - 1 : 0xffff);
    const __m512 a = load_bf16(x, mask), b = load_bf16(x + half, mask);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cosines), s = _mm512_maskz_loadu_ps(mask, sines);
    const __m512 low = _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), high = _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s));
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(low));
    _mm256_mask_storeu_epi16(to + half, mask, (__m256i)_mm512_cvtneps_pbh(high));
}

/* Two rows of 16 floats -> 16 pairs (low, high) of bf16: one row of an AMX B operand. */
static inline __m512i pair_rows(__m512 low, __m512 high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* 16 x 16 dwords, in place. */
static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* 2^x, relative error below 3e-6 (a minimax polynomial on [0, 1), Lawson's method); 0 for very negative x. Two
 * instructions split off the whole part and put it back: the reduction leaves x - floor(x), the scaling takes floor(x). */
static inline __m512 exp2_16(__m512 x) {
    const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.0135341676f);
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.0520114612f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.241442757f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.693003835f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.00000259f));
    return _mm512_scalef_ps(p, x);
}

/* x / (1 + exp(-x)) */
static inline __m512 silu_16(__m512 x) {
    const __m512 e = exp2_16(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

#endif
