/* Copies units of KV blocks and takes their digests in the same pass: the bytes are read once. Compiled by native.py,
 * called through ctypes by copying.py, which defines unit and digest.
 *
 * What limits both is the way from and to memory, so eight units far apart are read side by side: eight pages keep more
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

#define ABREAST 8     /* units side by side */
#define WORDS 8
#define LINE 64       /* bytes: WORDS words */
#define AHEAD 512     /* bytes of each unit that are asked for before their turn */
#define FACTOR 0x9E3779B97F4A7C15u

typedef uint64_t Line __attribute__((vector_size(LINE), may_alias));
typedef uint64_t AnyLine __attribute__((vector_size(LINE), may_alias, aligned(1)));
typedef uint64_t Half __attribute__((vector_size(LINE / 2)));
typedef uint64_t Quarter __attribute__((vector_size(LINE / 4)));

enum { NOWHERE, PLAIN, STREAM };

/* A unit: where it lies in a block of the source and of the target, and what its lanes begin with. */
typedef struct {
    int64_t from, to;
    uint64_t seed;
} Unit;

/* `count` blocks, of each of which the same `num_units` units of `size` bytes are wanted. */
typedef struct {
    const char *from;
    char *to;
    int64_t from_block, to_block; /* bytes of a block */
    const int64_t *sources, *targets;
    int64_t count;
    const Unit *units;
    int64_t num_units, size;
    uint64_t *digests; /* of each block; those of its units are added */
} Job;

/* One step of as many lanes as the vectors have words. */
#define STEP(lanes, words) ((((lanes) ^ (words)) ^ (((lanes) ^ (words)) >> 32)) * FACTOR)

/* The lanes' halves step together until one is left. */
INLINE uint64_t fold(Line lanes, int64_t size) {
    Half halves[2];
    Quarter quarters[2];
    memcpy(halves, &lanes, sizeof halves);
    halves[0] = STEP(halves[0], halves[1]);
    memcpy(quarters, halves, sizeof quarters);
    quarters[0] = STEP(quarters[0], quarters[1]);
    const uint64_t last = STEP(quarters[0][0], quarters[0][1]);
    uint64_t x = STEP(last, (uint64_t)size);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

INLINE void put(char *to, Line words, int how) {
#if defined(__AVX512F__)
    if (how == STREAM) _mm512_stream_si512((void *)to, (__m512i)words);
#elif defined(__AVX__)
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

/* Where one lane of `pass` is: at a unit of a block, and at the one that follows. */
typedef struct {
    int64_t block, unit;
    const char *from;
} Place;

INLINE Place place(const Job *job, int64_t number) {
    const int64_t block = number / job->num_units, unit = number % job->num_units;
    return (Place){block, unit, job->from + job->sources[block] * job->from_block + job->units[unit].from};
}

INLINE Place following(const Job *job, Place now) {
    if (++now.unit == job->num_units) {
        if (now.block + 1 == job->count) return now; /* there is none; it is not read */
        now.unit = 0;
        now.block++;
    }
    now.from = job->from + job->sources[now.block] * job->from_block + job->units[now.unit].from;
    return now;
}

/* The units at places[0], places[1], ..., `abreast` of them, each of which moves on to the one that follows. */
INLINE void pass(const Job *job, Place *places, int abreast, int how) {
    const char *from[ABREAST], *next[ABREAST];
    char *to[ABREAST];
    uint64_t *digests[ABREAST];
    Line lanes[ABREAST];
    const int64_t size = job->size, whole = size / LINE * LINE;
    for (int p = 0; p < abreast; p++) {
        const int64_t block = places[p].block;
        const Unit *unit = job->units + places[p].unit;
        from[p] = places[p].from;
        to[p] = how == NOWHERE ? NULL : job->to + job->targets[block] * job->to_block + unit->to;
        digests[p] = job->digests + block;
        places[p] = following(job, places[p]);
        next[p] = places[p].from - whole;
        lanes[p] = (Line){1, 2, 3, 4, 5, 6, 7, 8} * FACTOR ^ unit->seed;
    }
    int64_t at = 0;
    for (; at < whole - AHEAD; at += LINE)
        for (int p = 0; p < abreast; p++) {
            __builtin_prefetch(from[p] + at + AHEAD);
            const Line words = *(const AnyLine *)(from[p] + at);
            put(to[p] + at, words, how);
            lanes[p] = STEP(lanes[p], words);
        }
    for (; at < whole; at += LINE)
        for (int p = 0; p < abreast; p++) {
            __builtin_prefetch(next[p] + at + AHEAD);
            const Line words = *(const AnyLine *)(from[p] + at);
            put(to[p] + at, words, how);
            lanes[p] = STEP(lanes[p], words);
        }
    if (whole < size)
        for (int p = 0; p < abreast; p++) {
            Line rest = {0};
            memcpy(&rest, from[p] + whole, (size_t)(size - whole));
            if (how != NOWHERE) memcpy(to[p] + whole, &rest, (size_t)(size - whole));
            lanes[p] = STEP(lanes[p], rest);
        }
    for (int p = 0; p < abreast; p++) *digests[p] += fold(lanes[p], size);
}

/* The units of all blocks in a row: each lane of `pass` takes an equal share that lies together; what is left comes one
 * by one. */
INLINE void share(const Job *job, int how) {
    const int64_t total = job->count * job->num_units, each = total / ABREAST;
    Place places[ABREAST];
    for (int p = 0; p < ABREAST; p++) places[p] = place(job, p * each);
    for (int64_t i = 0; i < each; i++) pass(job, places, ABREAST, how);
    if (total % ABREAST) places[0] = place(job, each * ABREAST);
    for (int64_t i = 0; i < total % ABREAST; i++) pass(job, places, 1, how);
}

/* Takes as few blocks at a time as can be shared without a rest: what is read side by side then lies less far apart. */
INLINE void run(const Job *job, int how) {
    int64_t few = 1;
    while (few * job->num_units % ABREAST) few++;
    for (int64_t i = 0; job->num_units && i < job->count; i += few) {
        Job part = *job;
        part.count = job->count - i < few ? job->count - i : few;
        part.sources += i;
        if (how != NOWHERE) part.targets += i;
        part.digests += i;
        share(&part, how);
    }
}

/* Adds to digests[i] the digests of the units of block blocks[i] of `from`. */
EXPORT void ds_digest(const char *from, int64_t from_block, const int64_t *blocks, int64_t count, const Unit *units,
                      int64_t num_units, int64_t size, uint64_t *digests) {
    const Job job = {from, NULL, from_block, 0, blocks, NULL, count, units, num_units, size, digests};
    run(&job, NOWHERE);
}

/* Copies units of block sources[i] of `from` to block targets[i] of `to`; adds to digests[i] the digests of what was
 * written. */
EXPORT void ds_copy(const char *from, int64_t from_block, const int64_t *sources, char *to, int64_t to_block,
                    const int64_t *targets, int64_t count, const Unit *units, int64_t num_units, int64_t size,
                    uint64_t *digests) {
    const Job job = {from, to, from_block, to_block, sources, targets, count, units, num_units, size, digests};
    int aligned = ((uintptr_t)to | (uintptr_t)to_block | (uintptr_t)size) % LINE == 0;
    for (int64_t u = 0; u < num_units; u++) aligned &= units[u].to % LINE == 0;
    if (aligned)
        run(&job, STREAM);
    else
        run(&job, PLAIN);
#ifdef __AVX__
    _mm_sfence(); /* streamed lines are seen by others before what follows */
#endif
}
