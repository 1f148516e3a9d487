/* needs count transpose */
/* 32 pixels of one filter of a binary convolution: how many products are -1. Byte b of counts[r] is
   that of pixel 8 b + r; where planes is not 8 but 16, that of counts[8 + r] is 256 times as much. */
static void bnn_bconv_counts(const bnn_u32 *table, const uint32_t *w, int n, int planes,
                             bnn_u32 *counts)
{
    bnn_count(table, w, n, planes, 0, counts);
    bnn_bytes(counts);
    if (planes > 8)
        bnn_bytes(counts + 8);
}
