/* The sums and carries of three words, for both states of the third. */
#define BNN_THIRD(a, b, c, d, table)           \
    do {                                       \
        const uint32_t u_ = (a) ^ (b);         \
        const uint32_t both_ = (a) & (b);      \
        (table)[0] = u_ ^ (c);                 \
        (table)[1] = both_ | (u_ & (c));       \
        (table)[8] = u_ ^ (d);                 \
        (table)[9] = both_ | (u_ & (d));       \
    } while (0)

/* For each three words of planes the eight ways to weigh them: sum and carry of a full adder. */
static void bnn_triples(const bnn_u32 *planes, int n, bnn_u32 *table)
{
    const bnn_u32 *turned = planes + n, *const end = turned;
    BNN_ROLLED for (; planes < end; planes += 3, turned += 3, table += 16) {
        const uint32_t a = planes[0], b = planes[1], c = planes[2];
        const uint32_t x = turned[0], y = turned[1], z = turned[2];
        BNN_THIRD(a, b, c, z, table);
        BNN_THIRD(x, b, c, z, table + 2);
        BNN_THIRD(a, y, c, z, table + 4);
        BNN_THIRD(x, y, c, z, table + 6);
    }
}
