/* needs count bytes */
/* 32 pixels of one filter of a binary convolution: sums of +-1 products. planes is 8 or 16. */
static void bnn_bconv_column(const bnn_u32 *table, const uint32_t *w, int n, int planes, int products,
                             bnn_i16 *to)
{
    uint32_t sums[16];
    int b, r;
    bnn_count(table, w, n, planes, 0, sums);
    bnn_bytes(sums);
    if (planes > 8) {
        bnn_bytes(sums + 8);
        for (b = 0; b < 32; b += 8)
            for (r = 0; r < 8; r++)
                *to++ = (bnn_i16)(products - 2 * (int)((sums[r] >> b & 255u) | (sums[r + 8] >> b & 255u) << 8));
    } else
        for (b = 0; b < 32; b += 8)
            for (r = 0; r < 8; r++)
                *to++ = (bnn_i16)(products - 2 * (int)(sums[r] >> b & 255u));
}
