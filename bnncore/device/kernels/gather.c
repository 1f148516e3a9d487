/* needs put */
/* The bits of one window end to end: kh kw C bits in n words, taps in the padding left 0 and out of
   the mask. Returns how many taps lie in the map. */
static int bnn_gather(const bnn_window *g, const bnn_u32 *x, int oy, int ox, int n, bnn_u32 *row,
                      bnn_u32 *mask)
{
    const int words = (g->channels + 31) / 32, last = g->channels - 32 * (words - 1);
    const uint32_t end = last == 32 ? 0xffffffffu : (1u << last) - 1u;
    int i, j, k, taps = 0, at = 0;
    memset(row, 0, (size_t)n * sizeof *row);
    memset(mask, 0, (size_t)n * sizeof *mask);
    BNN_ROLLED for (i = 0; i < g->kh; i++) {
        const int y = oy * g->stride - g->pad + i;
        BNN_ROLLED for (j = 0; j < g->kw; j++, at += g->channels) {
            const int z = ox * g->stride - g->pad + j;
            const bnn_u32 *pixel;
            if (y < 0 || y >= g->height || z < 0 || z >= g->width)
                continue;
            taps++;
            pixel = x + ((int32_t)y * g->width + z) * words;
            BNN_ROLLED for (k = 0; k < words; k++) {
                bnn_put(row, at + 32 * k, pixel[k]);
                bnn_put(mask, at + 32 * k, k + 1 < words ? 0xffffffffu : end);
            }
        }
    }
    return taps;
}
