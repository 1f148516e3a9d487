/* The numbers of one window, 0 in the padding. */
static void bnn_window_TYPE(const bnn_window *g, const bnn_TYPE *x, int oy, int ox, bnn_TYPE *to)
{
    const int top = oy * g->stride - g->pad, left = ox * g->stride - g->pad;
    const int before = left < 0 ? -left : 0;
    const int end = left + g->kw > g->width ? g->width - left : g->kw;
    const int row = g->kw * g->channels;
    int i, y;
    memset(to, 0, (size_t)g->kh * (size_t)row * sizeof *to);
    BNN_ROLLED for (i = 0, y = top; i < g->kh; i++, y++, to += row)
        if (y >= 0 && y < g->height && before < end)
            memcpy(to + before * g->channels, x + ((int32_t)y * g->width + left + before) * g->channels,
                   (size_t)(end - before) * (size_t)g->channels * sizeof *to);
}
