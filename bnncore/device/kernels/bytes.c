/* Eight words, bit planes of 32 numbers, in place: byte b of word r becomes number 8 b + r. */
static void bnn_bytes(uint32_t *a)
{
    uint32_t mask = 0x0f0f0f0fu;
    int j, k, r;
    for (j = 4; j; j >>= 1, mask ^= mask << j)
        for (k = 0; k < 8; k += 2 * j)
            for (r = k; r < k + j; r++) {
                const uint32_t t = ((a[r] >> j) ^ a[r + j]) & mask;
                a[r + j] ^= t;
                a[r] ^= t << j;
            }
}
