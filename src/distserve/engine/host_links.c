/* How ranks of one host tell each other numbers: through memory that all of them map, without a copy in the kernel.
 *
 * A counter only goes up and one rank alone raises it; who waits for a value looks for a while, then sleeps in the kernel
 * (futex) until it is raised. Boards and boxes are used in turns, so that a rank may write the next while slower ones
 * still read the last:
 *
 *     board g % 2    generation g of a stage's sums and gathers: a slot for each rank. Who writes to it has seen that all
 *                    ranks have arrived at generation g - 1, and so are done with g - 2, which it held before.
 *     box n % BOXES  piece n of what a rank sends to the same place of the next stage.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))
#define BOXES 4

typedef struct {
    _Atomic uint32_t value, sleepers;
    uint8_t rest_of_line[56];
} Counter;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void raise_counter(Counter *c) {
    atomic_fetch_add(&c->value, 1);
    if (atomic_load(&c->sleepers)) syscall(SYS_futex, &c->value, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Returns once `c` has reached `value`. Differences are taken mod 2^32: counters may wrap. */
static void await(Counter *c, uint32_t value, int64_t looks) {
    for (int64_t i = 0; i < looks; i++) {
        if ((int32_t)(atomic_load_explicit(&c->value, memory_order_acquire) - value) >= 0) return;
        relax();
    }
    atomic_fetch_add(&c->sleepers, 1);
    for (;;) {
        const uint32_t found = atomic_load(&c->value);
        if ((int32_t)(found - value) >= 0) break;
        syscall(SYS_futex, &c->value, FUTEX_WAIT, found, NULL, NULL, 0);
    }
    atomic_fetch_sub(&c->sleepers, 1);
}

typedef struct {
    Counter *arrived;    /* [size]: the generation that each rank has written */
    float *boards;       /* [2][size][slot] */
    int64_t size, index; /* ranks, and which one this is */
    int64_t slot;        /* floats */
    int64_t looks;       /* at a counter before sleeping */
    uint32_t generation;
} Stage;

/* Writes this rank's part of the next generation; returns its board. */
static const float *write_part(Stage *s, const float *values, int64_t count) {
    const uint32_t generation = ++s->generation;
    float *board = s->boards + generation % 2 * s->size * s->slot;
    for (int64_t rank = 0; rank < s->size; rank++) await(s->arrived + rank, generation - 1, s->looks);
    memcpy(board + s->index * s->slot, values, (size_t)count * sizeof(float));
    raise_counter(s->arrived + s->index);
    return board;
}

/* `values` becomes the sum of that of all ranks, added in their order whatever the number of values: so no value depends
 * on the others beside it. Returns 0. */
EXPORT int64_t ds_sum(Stage *s, float *values, int64_t count) {
    for (int64_t at = 0; at < count; at += s->slot) {
        const int64_t n = MIN(s->slot, count - at);
        const float *board = write_part(s, values + at, n);
        for (int64_t rank = 0; rank < s->size; rank++) {
            const float *part = board + rank * s->slot;
            float *to = values + at;
            await(s->arrived + rank, s->generation, s->looks);
            if (rank == 0) memcpy(to, part, (size_t)n * sizeof(float));
            else
                for (int64_t i = 0; i < n; i++) to[i] += part[i];
        }
    }
    return 0;
}

/* `values` [rows, widths[index]] of every rank side by side: out [rows, sum of widths], at the first rank only. */
EXPORT void ds_gather_parts(Stage *s, const float *values, int64_t rows, const int64_t *widths, float *out) {
    int64_t widest = 0, total = 0;
    for (int64_t rank = 0; rank < s->size; rank++) {
        widest = widths[rank] > widest ? widths[rank] : widest;
        total += widths[rank];
    }
    for (int64_t at = 0; at < rows * widest; at += s->slot) { /* as many generations at every rank */
        const int64_t own = MIN(s->slot, rows * widths[s->index] - at);
        const float *board = write_part(s, values + at, own > 0 ? own : 0);
        for (int64_t rank = 0, column = 0; s->index == 0 && rank < s->size; column += widths[rank++]) {
            const float *from = board + rank * s->slot;
            const int64_t width = widths[rank], end = MIN(at + s->slot, rows * width);
            await(s->arrived + rank, s->generation, s->looks);
            for (int64_t i = at; i < end;) {
                const int64_t n = MIN(width - i % width, end - i);
                memcpy(out + i / width * total + column + i % width, from, (size_t)n * sizeof(float));
                from += n;
                i += n;
            }
        }
    }
}

typedef struct {
    Counter *sent, *taken;
    uint8_t *boxes; /* [BOXES][size] */
    int64_t size;   /* bytes of a box */
    int64_t looks;
    uint32_t number; /* pieces so far, of this end */
} Way;

EXPORT void ds_send(Way *w, const uint8_t *data, int64_t size) {
    for (int64_t at = 0; at < size; at += w->size) {
        const uint32_t number = ++w->number;
        await(w->taken, number - BOXES, w->looks);
        memcpy(w->boxes + number % BOXES * w->size, data + at, (size_t)MIN(w->size, size - at));
        raise_counter(w->sent);
    }
}

EXPORT void ds_receive(Way *w, uint8_t *data, int64_t size) {
    for (int64_t at = 0; at < size; at += w->size) {
        const uint32_t number = ++w->number;
        await(w->sent, number, w->looks);
        memcpy(data + at, w->boxes + number % BOXES * w->size, (size_t)MIN(w->size, size - at));
        raise_counter(w->taken);
    }
}
