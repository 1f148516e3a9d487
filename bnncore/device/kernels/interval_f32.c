/* needs bit pack */
/* low <= x <= high, negated where inside is 0. */
static void bnn_interval_f32(bnn_u32 *to, const bnn_f32 *v, int n, const bnn_f32 *low, const bnn_f32 *high,
                           const uint32_t *inside)
{
    uint32_t word = 0;
    int c;
    for (c = 0; c < n; c++) {
        const float x = v[c];
        word = bnn_pack(to, word, c, n, (low[c] <= x && x <= high[c]) == bnn_bit(inside, c));
    }
}
