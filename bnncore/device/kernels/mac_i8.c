/* v[o] += sum over c of a[c] * w[c][o], weights of one tap. */
static void bnn_mac_i8(bnn_f32 *v, const bnn_f32 *a, const int8_t *w, int channels, int filters)
{
    int c, o;
    for (c = 0; c < channels; c++, w += filters) {
        const float x = a[c];
        for (o = 0; o < filters; o++)
            v[o] += x * (float)w[o];
    }
}
