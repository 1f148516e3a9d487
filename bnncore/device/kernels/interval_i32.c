/* needs bit pack */
/* low <= x <= high, negated where inside is 0. */
static void bnn_interval_i32(bnn_u32 *to, const bnn_i32 *v, int n, const int32_t *low, const int32_t *high,
                           const uint32_t *inside)
{
    uint32_t word = 0;
    int c;
    for (c = 0; c < n; c++) {
        const int32_t x = v[c];
        word = bnn_pack(to, word, c, n, (low[c] <= x && x <= high[c]) == bnn_bit(inside, c));
    }
}
