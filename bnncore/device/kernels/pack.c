/* Bits, channel after channel: put one, and the word is stored when it is full. */
static uint32_t bnn_pack(bnn_u32 *to, uint32_t word, int c, int n, int bit)
{
    word |= (uint32_t)bit << (c & 31);
    if ((c & 31) == 31 || c + 1 == n) {
        to[c >> 5] = word;
        word = 0;
    }
    return word;
}
