/* needs half */
/* Half precision to floats. */
static void bnn_expand(bnn_f32 *to, const uint16_t *from, int n)
{
    int c;
    BNN_ROLLED for (c = 0; c < n; c++)
        to[c] = bnn_half(from[c]);
}
