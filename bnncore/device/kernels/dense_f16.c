/* needs half */
/* v[o] = sum over f of w[o][f] x[f]. */
static void bnn_dense_f16(bnn_f32 *v, const bnn_f32 *x, const uint16_t *w, int features, int outputs)
{
    int f, o;
    for (o = 0; o < outputs; o++, w += features) {
        float sum = 0.0f;
        for (f = 0; f < features; f++)
            sum += x[f] * bnn_half(w[f]);
        v[o] = sum;
    }
}
