/* needs differ gather */
/* Sums of +-1 products of one pixel for all filters: row and mask are room for n words each.
   A tap in the padding counts 0. */
static void bnn_bconv(const bnn_window *g, const bnn_u32 *x, int oy, int ox, const uint32_t *w,
                      int filters, int n, bnn_u32 *row, bnn_u32 *mask, bnn_i32 *sums)
{
    const int taps = bnn_gather(g, x, oy, ox, n, row, mask);
    const int32_t products = (int32_t)taps * g->channels;
    int o;
    BNN_ROLLED for (o = 0; o < filters; o++, w += n)
        sums[o] = products - 2 * bnn_differ(row, w, mask, n);
}
