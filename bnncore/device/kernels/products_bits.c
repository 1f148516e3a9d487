/* v[o] = sum over c of +-a[c]: for each c a row of words of filters. */
static void bnn_products_bits_NUMBER(SUM *v, const bnn_NUMBER *a, const uint32_t *w, int n, int filters)
{
    const int words = (filters + 31) / 32;
    int c, o;
    BNN_ROLLED for (o = 0; o < filters; o++)
        v[o] = 0;
    BNN_ROLLED for (c = 0; c < n; c++, w += words) {
        const SUM x = a[c];
        BNN_ROLLED for (o = 0; o < filters; o++)
            v[o] += (w[o >> 5] >> (o & 31)) & 1u ? x : -x;
    }
}
