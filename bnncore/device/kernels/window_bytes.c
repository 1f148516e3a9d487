/* The bytes of one window, in the padding those of `zero`. */
static void bnn_window_bytes(const bnn_window *g, const uint8_t *x, int oy, int ox,
                             const int16_t *zero, bnn_i16 *to)
{
    const int top = oy * g->stride - g->pad, left = ox * g->stride - g->pad;
    const int whole = left >= 0 && left + g->kw <= g->width;
    int i, j, c;
    BNN_ROLLED for (i = 0; i < g->kh; i++) {
        const int y = top + i, row = y >= 0 && y < g->height;
        int32_t at = ((int32_t)y * g->width + left) * g->channels;
        if (row && whole)
            BNN_ROLLED for (c = g->kw * g->channels; c > 0; c--)
                *to++ = x[at++];
        else
            BNN_ROLLED for (j = 0; j < g->kw; j++, at += g->channels) {
                const int inside = row && left + j >= 0 && left + j < g->width;
                BNN_ROLLED for (c = 0; c < g->channels; c++)
                    *to++ = inside ? x[at + c] : zero[c];
            }
    }
}
