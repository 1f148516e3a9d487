/* 32 words: bit c of word r becomes bit r of word c. */
static void bnn_transpose(bnn_u32 *a)
{
    uint32_t mask = 0x0000ffffu;
    int j, k, r;
    for (j = 16; j; j >>= 1, mask ^= mask << j)
        for (k = 0; k < 32; k += 2 * j)
            for (r = k; r < k + j; r++) {
                const uint32_t t = ((a[r] >> j) ^ a[r + j]) & mask;
                a[r + j] ^= t;
                a[r] ^= t << j;
            }
}
