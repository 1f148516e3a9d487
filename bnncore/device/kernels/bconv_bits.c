/* needs count at_most transpose */
/* 32 pixels of a binary convolution, its sums made bits: for each filter whether its count of
   differing inputs lies above limits[0] and is at most limits[1], negated by limits[2]. Counting
   starts so high that what is above carries into one bit more. */
static void bnn_bconv_bits(const bnn_u32 *table, const uint32_t *w, int filters, int n, int planes,
                           const int16_t *limits, bnn_u32 *room, int pixels, bnn_u32 *to)
{
    const int words = (filters + 31) / 32;
    uint32_t sums[16];
    int o, k, l;
    BNN_ROLLED for (k = 0; k < words; k++) {
        const int end = filters - 32 * k < 32 ? filters - 32 * k : 32;
        BNN_ROLLED for (o = 0; o < end; o++, w += n, limits += 3) {
            const uint32_t start = (1u << planes) - 1u - (uint32_t)limits[1];
            bnn_count(table, w, n, planes + 1, start, sums);
            room[o] = ~sums[planes];
            if (limits[0] >= 0)
                room[o] &= ~bnn_at_most(sums, planes + 1, limits[0] + (int)start);
            if (limits[2])
                room[o] = ~room[o];
        }
        BNN_ROLLED for (; o < 32; o++)
            room[o] = 0;
        bnn_transpose(room);
        BNN_ROLLED for (l = 0; l < 32 && l < pixels; l++)
            to[l * words + k] = room[l];
    }
}
