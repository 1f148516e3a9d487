/* Sum of a window, times `multiple` divided by its taps; with include_pad those in the padding too. */
static void bnn_sumpool_TYPE(const bnn_window *g, const bnn_TYPE *x, int oy, int ox, int include_pad,
                             int multiple, bnn_i32 *v)
{
    const int reach = include_pad ? g->pad : 0;
    int i, j, c, taps = 0, factor;
    for (c = 0; c < g->channels; c++)
        v[c] = 0;
    for (i = 0; i < g->kh; i++) {
        const int y = oy * g->stride - g->pad + i;
        for (j = 0; j < g->kw; j++) {
            const int z = ox * g->stride - g->pad + j;
            const bnn_TYPE *pixel;
            if (y >= -reach && y < g->height + reach && z >= -reach && z < g->width + reach)
                taps++;
            if (y < 0 || y >= g->height || z < 0 || z >= g->width)
                continue;
            pixel = x + ((int32_t)y * g->width + z) * g->channels;
            for (c = 0; c < g->channels; c++)
                v[c] += pixel[c];
        }
    }
    factor = taps == multiple ? 1 : multiple / taps;
    if (factor != 1)
        for (c = 0; c < g->channels; c++)
            v[c] *= factor;
}
