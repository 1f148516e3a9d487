/* A pixel of the image, normalised: each product is rounded before the sum. */
static void bnn_load_image(bnn_f32 *v, const uint8_t *x, int n, const float *scale,
                           const float *shift)
{
    int c;
    for (c = 0; c < n; c++) {
        const float y = (float)x[c] * scale[c];
        v[c] = y + shift[c];
    }
}
