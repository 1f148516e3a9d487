/* v[o] = sum over f of w[o][f] x[f]. */
static void bnn_dense_f32(bnn_f32 *v, const bnn_f32 *x, const float *w, int features, int outputs)
{
    int f, o;
    for (o = 0; o < outputs; o++, w += features) {
        float sum = 0.0f;
        for (f = 0; f < features; f++)
            sum += x[f] * w[f];
        v[o] = sum;
    }
}
