/* needs popcount full_adder */
/* In how many bits two strings of n words differ. Carry-save adders turn eight words into one of
   weight eight and three that are carried on, so that few words are counted one by one
   (Harley-Seal). */
static int32_t bnn_differ(const bnn_u32 *a, const bnn_u32 *w, int n)
{
    uint32_t ones = 0, twos = 0, fours = 0, count = 0;
    int k = 0;
    BNN_ROLLED for (; k + 8 <= n; k += 8) {
        uint32_t x, y, p, q, r;
        const uint32_t d0 = a[k] ^ w[k], d1 = a[k + 1] ^ w[k + 1];
        const uint32_t d2 = a[k + 2] ^ w[k + 2], d3 = a[k + 3] ^ w[k + 3];
        const uint32_t d4 = a[k + 4] ^ w[k + 4], d5 = a[k + 5] ^ w[k + 5];
        const uint32_t d6 = a[k + 6] ^ w[k + 6], d7 = a[k + 7] ^ w[k + 7];
        BNN_ADD(x, ones, d0, d1, ones);
        BNN_ADD(y, ones, d2, d3, ones);
        BNN_ADD(p, twos, x, y, twos);
        BNN_ADD(x, ones, d4, d5, ones);
        BNN_ADD(y, ones, d6, d7, ones);
        BNN_ADD(q, twos, x, y, twos);
        BNN_ADD(r, fours, p, q, fours);
        count += 8u * bnn_popcount(r);
    }
    BNN_ROLLED for (; k + 2 <= n; k += 2) {
        uint32_t x, p;
        const uint32_t d0 = a[k] ^ w[k], d1 = a[k + 1] ^ w[k + 1];
        BNN_ADD(x, ones, d0, d1, ones);
        p = twos & x;
        twos ^= x;
        count += 8u * bnn_popcount(fours & p);
        fours ^= p;
    }
    if (k < n) {
        const uint32_t d = a[k] ^ w[k], x = ones & d, p = twos & x;
        ones ^= d;
        twos ^= x;
        count += 8u * bnn_popcount(fours & p);
        fours ^= p;
    }
    count += bnn_popcount(ones) + 2u * bnn_popcount(twos) + 4u * bnn_popcount(fours);
    return (int32_t)count;
}

/* The same, of those bits that are 1 in the mask. */
static int32_t bnn_differ_within(const bnn_u32 *a, const bnn_u32 *w, const bnn_u32 *mask, int n)
{
    uint32_t count = 0;
    int k;
    BNN_ROLLED for (k = 0; k < n; k++)
        count += bnn_popcount((a[k] ^ w[k]) & mask[k]);
    return (int32_t)count;
}
