/* needs full_adder */
/* Four triples of a filter, picked from the table by its weights: three words of weight four. */
#define BNN_FOUR(x, y, z, table, w, k)                                  \
    do {                                                                \
        const bnn_u32 *const t0_ = (table) + 2 * ((w) >> (4 * (k)) & 7u); \
        const bnn_u32 *const t1_ = (table) + 16 + 2 * ((w) >> (4 * (k) + 4) & 7u); \
        const bnn_u32 *const t2_ = (table) + 32 + 2 * ((w) >> (4 * (k) + 8) & 7u); \
        const bnn_u32 *const t3_ = (table) + 48 + 2 * ((w) >> (4 * (k) + 12) & 7u); \
        uint32_t p_, q_;                                                \
        BNN_ADD(p_, ones, t0_[0], t1_[0], ones);                        \
        BNN_ADD(x, twos, t0_[1], t1_[1], twos);                         \
        BNN_ADD(q_, ones, t2_[0], t3_[0], ones);                        \
        BNN_ADD(y, twos, t2_[1], t3_[1], twos);                         \
        BNN_ADD(z, twos, p_, q_, twos);                                 \
    } while (0)

/* How many inputs differ from a filter's weights, for 32 pixels at once: bit l of sums[k] is bit k
   of pixel l's count, added to `start`. A word of weights holds eight triples; their number is
   even. */
BNN_ORDERED static void bnn_count(const bnn_u32 *table, const uint32_t *w, int words, int planes,
                                  uint32_t start, uint32_t *sums)
{
    uint32_t ones = 0u - (start & 1u), twos = 0u - (start >> 1 & 1u);
    uint32_t fours = 0u - (start >> 2 & 1u), eights = 0u - (start >> 3 & 1u);
    uint32_t sixteens = 0u - (start >> 4 & 1u), more = 0u - (start >> 5 & 1u);
    int k;
    BNN_ROLLED for (k = 6; k < planes; k++)
        sums[k] = 0u - (start >> k & 1u);
    BNN_ROLLED for (; words > 0; words -= 2, w += 2, table += 256) {
        uint32_t a, b, c, d, e, f, r, s, t, x, y, z;
        const uint32_t v = w[0], u = w[1];
        BNN_FOUR(a, b, c, table, v, 0);
        BNN_FOUR(d, e, f, table + 64, v, 4);
        BNN_ADD(r, fours, a, b, fours);
        BNN_ADD(s, fours, c, d, fours);
        BNN_ADD(t, fours, e, f, fours);
        BNN_ADD(x, eights, r, s, eights);
        BNN_FOUR(a, b, c, table + 128, u, 0);
        BNN_FOUR(d, e, f, table + 192, u, 4);
        BNN_ADD(r, fours, a, b, fours);
        BNN_ADD(s, fours, c, d, fours);
        BNN_ADD(y, eights, t, r, eights);
        BNN_ADD(r, fours, e, f, fours);
        BNN_ADD(z, eights, s, r, eights);
        BNN_ADD(a, sixteens, x, y, sixteens);
        b = sixteens & z;
        sixteens ^= z;
        BNN_ADD(c, more, a, b, more);
        BNN_ROLLED for (k = 6; c; k++) {
            const uint32_t carry = sums[k] & c;
            sums[k] ^= c;
            c = carry;
        }
    }
    sums[0] = ones;
    sums[1] = twos;
    sums[2] = fours;
    sums[3] = eights;
    sums[4] = sixteens;
    sums[5] = more;
}
