/* Bit c of an array of words; where there is no array it is 1. */
static int bnn_bit(const uint32_t *bits, int c)
{
    return bits ? (int)((bits[c >> 5] >> (c & 31)) & 1u) : 1;
}
