/* to[c] += weight * softmax(z)[c], of integers z 2^-fraction, by integers: powers of two of a table
   for each 256th of an exponent; all is rounded down. */
static void bnn_softmax_table(bnn_f32 *to, const bnn_f32 *z, float weight, int fraction,
                              const uint16_t *table, int n)
{
    const float unit = 1.0f / 16384.0f;
    const float whole = fraction < 0 ? 1.0f / (float)(1 << -fraction) : (float)(1 << fraction);
    float most = z[0];
    uint32_t sum = 0;
    int c, pass;
    BNN_ROLLED for (c = 1; c < n; c++)
        most = z[c] > most ? z[c] : most;
    BNN_ROLLED for (pass = 0; pass < 2; pass++)
        BNN_ROLLED for (c = 0; c < n; c++) {
            const uint32_t steps = (uint32_t)((most - z[c]) * whole) * 5909u >> (fraction + 4);
            const uint32_t e = (uint32_t)table[steps & 255u] >> (steps >> 8 < 31u ? steps >> 8 : 31u);
            if (pass)
                to[c] += weight * ((float)((e << 14) / sum) * unit);
            else
                sum += e;
        }
}
