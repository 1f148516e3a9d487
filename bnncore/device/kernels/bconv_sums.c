/* needs count */
/* 32 pixels of a binary convolution: sums of +-1 products, filters of a pixel together. */
static void bnn_bconv_sums(const bnn_u32 *table, const uint32_t *w, int filters, int n, int planes,
                           int products, bnn_u32 *sums, bnn_i32 *to)
{
    int o, j, k, l;
    for (o = 0; o < filters; o++, w += n, to++) {
        bnn_count(table, w, n, planes, sums);
        for (l = 0; l < 32; l += 4) {
            /* A byte a pixel: the product puts four bits in a row into four bytes. */
            const int at = l * filters;
            uint32_t low = 0, high = 0;
            for (k = 0; k < planes && k < 8; k++)
                low |= ((sums[k] >> l & 15u) * 0x00204081u & 0x01010101u) << k;
            for (; k < planes; k++)
                high |= ((sums[k] >> l & 15u) * 0x00204081u & 0x01010101u) << (k - 8);
            for (j = 0; j < 4; j++)
                to[at + j * filters] =
                    products - 2 * (int32_t)((low >> 8 * j & 255u) | (high >> 8 * j & 255u) << 8);
        }
    }
}
