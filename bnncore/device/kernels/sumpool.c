/* Sum of a window, times `multiple` divided by its taps; with include_pad those in the padding too. */
static void bnn_sumpool_TYPE(const bnn_window *g, const bnn_TYPE *x, int oy, int ox, int include_pad,
                             int multiple, bnn_i32 *v)
{
    const int reach = include_pad ? g->pad : 0, row = g->width * g->channels;
    const int top = oy * g->stride - g->pad, left = ox * g->stride - g->pad;
    const int y0 = top < 0 ? 0 : top, z0 = left < 0 ? 0 : left;
    const int y1 = top + g->kh < g->height ? top + g->kh : g->height;
    const int z1 = left + g->kw < g->width ? left + g->kw : g->width;
    /* What an average divides by. */
    const int first = top > -reach ? top : -reach, begin = left > -reach ? left : -reach;
    const int high = (top + g->kh < g->height + reach ? top + g->kh : g->height + reach) - first;
    const int wide = (left + g->kw < g->width + reach ? left + g->kw : g->width + reach) - begin;
    const int factor = high * wide == multiple ? 1 : multiple / (high * wide);
    int y, z, c;
    x += (int32_t)y0 * row + z0 * g->channels;
    if (y1 - y0 == 2 && z1 - z0 == 2 && factor == 1)
        BNN_ROLLED for (c = 0; c < g->channels; c++)
            v[c] = x[c] + x[c + g->channels] + x[c + row] + x[c + row + g->channels];
    else
        BNN_ROLLED for (c = 0; c < g->channels; c++) {
            int32_t sum = 0;
            BNN_ROLLED for (y = 0; y < y1 - y0; y++)
                BNN_ROLLED for (z = 0; z < z1 - z0; z++)
                    sum += x[c + y * row + z * g->channels];
            v[c] = sum * factor;
        }
}
