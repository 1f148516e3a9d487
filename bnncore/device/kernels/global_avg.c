/* Mean over all pixels. */
static void bnn_global_avg_TYPE(const bnn_TYPE *x, int pixels, int channels, bnn_f32 *v)
{
    const float count = (float)pixels;
    int p, c;
    BNN_ROLLED for (c = 0; c < channels; c++)
        v[c] = 0.0f;
    BNN_ROLLED for (p = 0; p < pixels; p++, x += channels)
        BNN_ROLLED for (c = 0; c < channels; c++)
            v[c] += (float)x[c];
    BNN_ROLLED for (c = 0; c < channels; c++)
        v[c] /= count;
}
