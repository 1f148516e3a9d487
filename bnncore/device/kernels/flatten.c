/* Pixels of channels to channels of pixels, torch's order. */
static void bnn_flatten_TYPE(bnn_TYPE *to, const bnn_TYPE *x, int pixels, int channels)
{
    int p, c;
    BNN_ROLLED for (p = 0; p < pixels; p++)
        BNN_ROLLED for (c = 0; c < channels; c++)
            to[c * pixels + p] = *x++;
}
