/* Sum over all pixels. */
static void bnn_global_sum_TYPE(const bnn_TYPE *x, int pixels, int channels, bnn_i32 *v)
{
    int p, c;
    BNN_ROLLED for (c = 0; c < channels; c++)
        v[c] = 0;
    BNN_ROLLED for (p = 0; p < pixels; p++, x += channels)
        BNN_ROLLED for (c = 0; c < channels; c++)
            v[c] += x[c];
}
