/* For each three words of planes the eight ways to weigh them: sum and carry of a full adder. */
static void bnn_triples(const bnn_u32 *planes, int n, bnn_u32 *table)
{
    int k, t;
    for (k = 0; k < n; k += 3)
        for (t = 0; t < 4; t++, table += 2) {
            const uint32_t a = planes[(t & 1 ? n : 0) + k], b = planes[(t & 2 ? n : 0) + k + 1];
            const uint32_t u = a ^ b, both = a & b, c = planes[k + 2], d = planes[n + k + 2];
            table[0] = u ^ c;
            table[1] = both | (u & c);
            table[8] = u ^ d;
            table[9] = both | (u & d);
            if (t == 3)
                table += 8;
        }
}
