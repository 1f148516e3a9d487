/* needs put */
/* Append n bits to a row. */
static void bnn_concat_bits(bnn_u32 *row, int at, const bnn_u32 *bits, int n)
{
    int k;
    BNN_ROLLED for (k = 0; 32 * k < n; k++)
        bnn_put(row, at + 32 * k, bits[k]);
}
