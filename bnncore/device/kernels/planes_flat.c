/* needs lanes */
/* As bnn_planes, where the result is as high and wide as the map: then the input of a tap is that
   of another pixel, so many before or after, and its words are those of bnn_slice, shifted. */
static void bnn_planes_flat(const bnn_window *g, const bnn_u32 *flat, int p, int n, bnn_u32 *planes)
{
    const int width = g->width, channels = g->channels;
    const int most = (g->height * width - 1) / 32;
    const int y0 = p / width, z0 = p - y0 * width;
    int i, j, c;
    for (i = -g->pad; i <= g->pad; i++)
        for (j = -g->pad; j <= g->pad; j++) {
            const int from = p + i * width + j, s = from & 31, k = (from - s) / 32;
            const bnn_u32 *a = flat + (k < 0 ? 0 : k > most ? most : k) * channels;
            const bnn_u32 *b = flat + (k < 0 ? 0 : k >= most ? most : k + 1) * channels;
            uint32_t valid = 0;
            int y = y0 + i, l = -z0;
            for (; l < 32; l += width, y++)
                if (y >= 0 && y < g->height)
                    valid |= bnn_lanes(l + (j < 0 ? -j : 0), l + width - (j > 0 ? j : 0));
            for (c = 0; c + 1 < channels; c += 2, planes += 2) {
                const uint32_t x = (a[c] >> s | b[c] << 1 << (31 - s)) & valid;
                const uint32_t z = (a[c + 1] >> s | b[c + 1] << 1 << (31 - s)) | ~valid;
                planes[0] = x;
                planes[1] = z;
                planes[n] = x ^ valid;
                planes[n + 1] = z ^ valid;
            }
            if (c < channels) {
                const uint32_t x = (a[c] >> s | b[c] << 1 << (31 - s)) & valid;
                planes[0] = x;
                planes[n] = x ^ valid;
                planes++;
            }
        }
    for (c = channels * g->kh * g->kw; c < n; c++, planes++)
        planes[0] = planes[n] = 0;
}
