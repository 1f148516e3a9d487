/* Put a word of bits into a row of words, from bit `at` on; they must be 0 there before. */
static void bnn_put(bnn_u32 *row, int at, uint32_t bits)
{
    const int k = at >> 5, s = at & 31;
    row[k] |= bits << s;
    if (s && bits >> (32 - s))
        row[k + 1] |= bits >> (32 - s);
}
