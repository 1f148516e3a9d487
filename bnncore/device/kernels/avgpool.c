/* Mean of a window; with include_pad it divides by the taps in the padding too. */
static void bnn_avgpool_TYPE(const bnn_window *g, const bnn_TYPE *x, int oy, int ox, int include_pad,
                          bnn_f32 *v)
{
    const int reach = include_pad ? g->pad : 0;
    int i, j, c, taps = 0;
    float count;
    BNN_ROLLED for (c = 0; c < g->channels; c++)
        v[c] = 0.0f;
    BNN_ROLLED for (i = 0; i < g->kh; i++) {
        const int y = oy * g->stride - g->pad + i;
        BNN_ROLLED for (j = 0; j < g->kw; j++) {
            const int z = ox * g->stride - g->pad + j;
            const bnn_TYPE *pixel;
            if (y >= -reach && y < g->height + reach && z >= -reach && z < g->width + reach)
                taps++;
            if (y < 0 || y >= g->height || z < 0 || z >= g->width)
                continue;
            pixel = x + ((int32_t)y * g->width + z) * g->channels;
            BNN_ROLLED for (c = 0; c < g->channels; c++)
                v[c] += (float)pixel[c];
        }
    }
    count = (float)taps;
    BNN_ROLLED for (c = 0; c < g->channels; c++)
        v[c] /= count;
}
