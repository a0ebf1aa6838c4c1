/* Copies KV blocks and takes their digests in the same pass: the bytes are read once. Compiled by native.py, called
 * through ctypes by copying.py, which defines the digest.
 *
 * What limits both is the way from and to memory, so a block's eight parts are read side by side: eight pages keep more
 * of the processor's prefetchers busy than one, and are read 1.6 times as fast. Copies bypass the caches where the
 * processor can do that: a line that is written whole need not be fetched first.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the digest is of little-endian words"
#endif

#ifdef __AVX__
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#define PARTS 8
#define WORDS 8
#define LINE 64                /* bytes: WORDS words */
#define ROUND (PARTS * LINE)   /* a line of each part */
#define AHEAD 512              /* bytes of each part that are asked for before their turn */
#define FACTOR 0x9E3779B97F4A7C15u

typedef uint64_t Line __attribute__((vector_size(LINE), may_alias));
typedef uint64_t AnyLine __attribute__((vector_size(LINE), may_alias, aligned(1)));

enum { NOWHERE, PLAIN, STREAM };

INLINE void step(Line *lanes, Line words) {
    const Line mixed = *lanes ^ words;
    *lanes = (mixed ^ (mixed >> 32)) * FACTOR;
}

INLINE void put(char *to, Line words, int how) {
#if defined(__AVX512F__)
    if (how == STREAM) _mm512_stream_si512((void *)to, (__m512i)words);
#elif defined(__AVX__)
    typedef long long Half __attribute__((vector_size(LINE / 2)));
    if (how == STREAM) {
        Half halves[2];
        memcpy(halves, &words, LINE);
        _mm256_stream_si256((__m256i *)to, (__m256i)halves[0]);
        _mm256_stream_si256((__m256i *)to + 1, (__m256i)halves[1]);
    }
#else
    if (how == STREAM) *(AnyLine *)to = words;
#endif
    if (how == PLAIN) *(AnyLine *)to = words;
}

/* Digest of `size` bytes, which also go to `to`, unless that is NOWHERE. */
INLINE uint64_t pass(const char *from, char *to, int64_t size, int how) {
    const int64_t part = size / ROUND * LINE, rest = size % ROUND;
    Line lanes[PARTS];
    for (int p = 0; p < PARTS; p++)
        for (int w = 0; w < WORDS; w++) lanes[p][w] = (uint64_t)(p * WORDS + w + 1) * FACTOR;
    for (int64_t at = 0; at < part; at += LINE)
        for (int p = 0; p < PARTS; p++) {
            const char *line = from + p * part + at;
            __builtin_prefetch(line + AHEAD);
            const Line words = *(const AnyLine *)line;
            put(to + p * part + at, words, how);
            step(lanes + p, words);
        }
    if (rest) {
        char last[ROUND] __attribute__((aligned(LINE))) = {0};
        memcpy(last, from + size - rest, (size_t)rest);
        if (how != NOWHERE) memcpy(to + size - rest, last, (size_t)rest);
        for (int p = 0; p < PARTS; p++) step(lanes + p, *(const Line *)(last + p * LINE));
    }
    uint64_t digest = (uint64_t)size;
    for (int p = 0; p < PARTS; p++)
        for (int w = 0; w < WORDS; w++) {
            digest ^= lanes[p][w];
            digest = (digest ^ (digest >> 32)) * FACTOR;
        }
    return digest ^ (digest >> 32);
}

/* The digest of each of `count` blocks of `size` bytes. */
EXPORT void ds_digest(const char *from, int64_t size, int64_t count, const int64_t *blocks, uint64_t *digests) {
    for (int64_t i = 0; i < count; i++) digests[i] = pass(from + blocks[i] * size, NULL, size, NOWHERE);
}

/* Copies block sources[i] of `from` to block targets[i] of `to`; digests[i] is of the bytes that were written. */
EXPORT void ds_copy(const char *from, const int64_t *sources, char *to, const int64_t *targets, int64_t size,
                    int64_t count, uint64_t *digests) {
    const int aligned = (uintptr_t)to % LINE == 0 && size % LINE == 0;
    for (int64_t i = 0; i < count; i++) {
        const char *block = from + sources[i] * size;
        char *copy = to + targets[i] * size;
        digests[i] = aligned ? pass(block, copy, size, STREAM) : pass(block, copy, size, PLAIN);
    }
#ifdef __AVX__
    _mm_sfence(); /* streamed lines are seen by others before what follows */
#endif
}
