/* needs lanes */
/* Channel k of two words of 32 pixels, from pixel s on; in the padding as `op` and `mask` say. */
#define BNN_PLANE(k, op, mask)                                               \
    do {                                                                     \
        const uint32_t x_ = (a[k] >> s | b[k] << 1 << (31 - s)) op (mask);   \
        planes[k] = x_;                                                      \
        planes[n + (k)] = x_ ^ valid;                                        \
    } while (0)

/* As bnn_planes, where the result is as high and wide as the map: then the input of a tap is that
   of another pixel, so many before or after, and its words are those of bnn_slice, shifted. */
static void bnn_planes_flat(const bnn_window *g, const bnn_u32 *flat, int p, int n, bnn_u32 *planes)
{
    const int width = g->width, channels = g->channels;
    const int most = (g->height * width - 1) / 32;
    const int y0 = p / width, z0 = p - y0 * width;
    int i, j, c;
    BNN_ROLLED for (i = -g->pad; i <= g->pad; i++)
        BNN_ROLLED for (j = -g->pad; j <= g->pad; j++) {
            const int from = p + i * width + j, s = from & 31, k = (from - s) / 32;
            const bnn_u32 *a = flat + (k < 0 ? 0 : k > most ? most : k) * channels;
            const bnn_u32 *b = flat + (k < 0 ? 0 : k >= most ? most : k + 1) * channels;
            uint32_t valid = 0;
            int y = y0 + i, l = -z0;
            BNN_ROLLED for (; l < 32; l += width, y++)
                if (y >= 0 && y < g->height)
                    valid |= bnn_lanes(l + (j < 0 ? -j : 0), l + width - (j > 0 ? j : 0));
            BNN_ROLLED for (c = 0; c + 4 <= channels; c += 4, a += 4, b += 4, planes += 4) {
                BNN_PLANE(0, &, valid);
                BNN_PLANE(1, |, ~valid);
                BNN_PLANE(2, &, valid);
                BNN_PLANE(3, |, ~valid);
            }
            BNN_ROLLED for (; c < channels; c++, a++, b++, planes++)
                if (c & 1)
                    BNN_PLANE(0, |, ~valid);
                else
                    BNN_PLANE(0, &, valid);
        }
    BNN_ROLLED for (c = channels * g->kh * g->kw; c < n; c++, planes++)
        planes[0] = planes[n] = 0;
}
