/* Sums of products on AMX tiles: TDPBF16PS, 32 rows by 32 outputs at a time. Part of linear.h, which says what is multiplied
 * with what, and when.
 */
#pragma once

/* Tiles: 0, 1 sums of the first sixteen rows, 2, 3 of the second; 4, 5 those rows of x; 6, 7 weights. */
static inline void configure_product(int first_rows, int second_rows) {
    const uint8_t a = (uint8_t)first_rows, b = (uint8_t)second_rows;
    configure_tiles((const uint8_t[8]){a, a, b, b, a, b, 16, 16});
}

/* `count` <= 32 rows of x from `row` on times units [first, last). While the tiles multiply one unit, the vector units
 * write the one before. */
static inline __attribute__((always_inline)) void multiply_tiles(const Product *p, int64_t mode, const bf16 *x,
                                                                int64_t stride, int64_t row, int64_t count,
                                                                int64_t first, int64_t last, int first_use,
                                                                Ahead *ahead) {
    float sums[2][1024] __attribute__((aligned(64)));
    const int64_t steps = p->steps, share = CEIL_DIV(32, steps);
    const size_t bytes = (size_t)stride * 2;
    const bf16 *b = p->w->weight + first * steps * 1024;
    Pending before = {.rows = 0};
    BEFORE_TILE_LOAD();
    for (int64_t unit = first; unit < last; unit++) {
        const bf16 *low = x + row * stride, *high = low + 16 * stride;
        float *to = sums[unit % 2];
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < steps; step++, b += 1024, low += 32, high += 32) {
            if (first_use) prefetch_step(b);
            else prefetch_ahead(ahead);
            _tile_loadd(4, low, bytes);
            if (first_use) {
                _tile_loadd(6, b, 64);
                _tile_loadd(7, b + 512, 64);
            } else { /* past the first-level cache, which so keeps the rows of x */
                _tile_stream_loadd(6, b, 64);
                _tile_stream_loadd(7, b + 512, 64);
            }
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (count > 16) {
                _tile_loadd(5, high, bytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            write_sums(p, mode, &before, (step + 1) * share);
            prefetch_outputs(p, mode, unit, row + step * share, MIN(share, count - step * share));
        }
        _tile_stored(0, to, 128);
        _tile_stored(1, to + 16, 128);
        if (count > 16) {
            _tile_stored(2, to + 512, 128);
            _tile_stored(3, to + 528, 128);
        }
        BEFORE_TILE_LOAD();
        before = pending(p, unit, row, count, to);
    }
    write_sums(p, mode, &before, 32);
}
