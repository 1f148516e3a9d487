/* The numbers of one window, 0 in the padding. */
static void bnn_window_TYPE(const bnn_window *g, const bnn_TYPE *x, int oy, int ox, bnn_TYPE *to)
{
    int i, j, c;
    BNN_ROLLED for (i = 0; i < g->kh; i++) {
        const int y = oy * g->stride - g->pad + i;
        BNN_ROLLED for (j = 0; j < g->kw; j++, to += g->channels) {
            const int z = ox * g->stride - g->pad + j;
            const int inside = y >= 0 && y < g->height && z >= 0 && z < g->width;
            const bnn_TYPE *pixel = x + (inside ? ((int32_t)y * g->width + z) * g->channels : 0);
            BNN_ROLLED for (c = 0; c < g->channels; c++)
                to[c] = inside ? pixel[c] : 0;
        }
    }
}
