/* needs count bytes */
/* 32 pixels of a binary convolution: sums of +-1 products, filters of a pixel together. */
static void bnn_bconv_sums(const bnn_u32 *table, const uint32_t *w, int filters, int n, int planes,
                           int products, bnn_i16 *to)
{
    uint32_t sums[16];
    int o, b, r;
    memset(sums, 0, sizeof sums);
    for (o = 0; o < filters; o++, w += n, to++) {
        bnn_i16 *at = to;
        memset(sums, 0, 8 * sizeof *sums);
        bnn_count(table, w, n, planes, 0, sums);
        bnn_bytes(sums);
        if (planes > 8) {
            bnn_bytes(sums + 8);
            for (b = 0; b < 32; b += 8)
                for (r = 0; r < 8; r++, at += filters)
                    *at = (bnn_i16)(products - 2 * (int)((sums[r] >> b & 255u) | (sums[r + 8] >> b & 255u) << 8));
            memset(sums + 8, 0, 8 * sizeof *sums);
        } else
            for (b = 0; b < 32; b += 8)
                for (r = 0; r < 8; r++, at += filters)
                    *at = (bnn_i16)(products - 2 * (int)(sums[r] >> b & 255u));
    }
}
