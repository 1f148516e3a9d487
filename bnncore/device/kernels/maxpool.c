/* Largest of a window; taps in the padding never win. */
static void bnn_maxpool_TYPE(const bnn_window *g, const bnn_TYPE *x, int oy, int ox, bnn_TYPE *v)
{
    int i, j, c, first = 1;
    BNN_ROLLED for (i = 0; i < g->kh; i++) {
        const int y = oy * g->stride - g->pad + i;
        BNN_ROLLED for (j = 0; j < g->kw; j++) {
            const int z = ox * g->stride - g->pad + j;
            const bnn_TYPE *pixel;
            if (y < 0 || y >= g->height || z < 0 || z >= g->width)
                continue;
            pixel = x + ((int32_t)y * g->width + z) * g->channels;
            BNN_ROLLED for (c = 0; c < g->channels; c++)
                if (first || pixel[c] > v[c])
                    v[c] = pixel[c];
            first = 0;
        }
    }
}
