/* needs popcount full_adder */
#define BNN_DIFFER(k) ((a[k] ^ w[k]) & mask[k])

/* In how many bits two strings of n words differ, of those that are 1 in the mask. Carry-save adders
   turn eight words into one of weight eight and three that are carried on (Harley-Seal). */
static int32_t bnn_differ(const bnn_u32 *a, const uint32_t *w, const bnn_u32 *mask, int n)
{
    uint32_t count = 0;
    if (n >= 8) {
        uint32_t ones = 0, twos = 0, fours = 0;
        BNN_ROLLED for (; n >= 8; n -= 8, a += 8, w += 8, mask += 8) {
            uint32_t x, y, p, q, r;
            BNN_ADD(x, ones, BNN_DIFFER(0), BNN_DIFFER(1), ones);
            BNN_ADD(y, ones, BNN_DIFFER(2), BNN_DIFFER(3), ones);
            BNN_ADD(p, twos, x, y, twos);
            BNN_ADD(x, ones, BNN_DIFFER(4), BNN_DIFFER(5), ones);
            BNN_ADD(y, ones, BNN_DIFFER(6), BNN_DIFFER(7), ones);
            BNN_ADD(q, twos, x, y, twos);
            BNN_ADD(r, fours, p, q, fours);
            count += 8u * bnn_popcount(r);
        }
        count += bnn_popcount(ones) + 2u * bnn_popcount(twos) + 4u * bnn_popcount(fours);
    }
    BNN_ROLLED for (; n > 0; n--)
        count += bnn_popcount((*a++ ^ *w++) & *mask++);
    return (int32_t)count;
}
