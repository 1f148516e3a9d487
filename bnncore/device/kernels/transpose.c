/* A stage of the transposition: blocks of j bits change places within 2 j words. */
static void bnn_swap(bnn_u32 *a, int words, int j, uint32_t mask)
{
    int k, r;
    for (k = 0; k < words; k += 2 * j)
        for (r = k; r < k + j; r++) {
            const uint32_t low = a[r], high = a[r + j], t = ((low >> j) ^ high) & mask;
            a[r + j] = high ^ t;
            a[r] = low ^ t << j;
        }
}

/* 32 words: bit c of word r becomes bit r of word c. */
static void bnn_transpose(bnn_u32 *a)
{
    bnn_swap(a, 32, 16, 0x0000ffffu);
    bnn_swap(a, 32, 8, 0x00ff00ffu);
    bnn_swap(a, 32, 4, 0x0f0f0f0fu);
    bnn_swap(a, 32, 2, 0x33333333u);
    bnn_swap(a, 32, 1, 0x55555555u);
}
