/* v[o] += sum over c of +-a[c], signs of one tap: for each c a row of words of filters. */
static void bnn_mac_bits(bnn_f32 *v, const bnn_f32 *a, const uint32_t *w, int channels, int filters)
{
    const int words = (filters + 31) / 32;
    int c, o;
    for (c = 0; c < channels; c++, w += words) {
        const float x = a[c];
        for (o = 0; o < filters; o++)
            v[o] += (w[o >> 5] >> (o & 31)) & 1u ? x : -x;
    }
}
