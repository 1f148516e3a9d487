/* needs bit pack */
/* x >= level where the direction is 1 (or none is given), x <= level where it is 0. */
static void bnn_threshold_i32(bnn_u32 *to, const bnn_i32 *v, int n, const int32_t *level,
                            const uint32_t *direction)
{
    uint32_t word = 0;
    int c;
    for (c = 0; c < n; c++) {
        const int32_t x = v[c], t = level[c];
        word = bnn_pack(to, word, c, n, bnn_bit(direction, c) ? x >= t : x <= t);
    }
}
