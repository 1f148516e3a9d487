/* v[o] = sum over c of +-a[c]: for each c a row of words of filters. Eight filters at a time, so that
   their sums stay in registers. */
#define BNN_SIGNED(k) s##k += u >> k & 1u ? x : -x
static void bnn_products_bits_NUMBER(SUM *v, const bnn_NUMBER *a, const uint32_t *w, int n, int filters)
{
    const int words = (filters + 31) / 32;
    int c, o;
    BNN_ROLLED for (o = 0; o < filters; o += 8) {
        const uint32_t *row = w + (o >> 5);
        SUM s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
        BNN_ROLLED for (c = 0; c < n; c++, row += words) {
            const SUM x = a[c];
            const uint32_t u = *row >> (o & 31);
            BNN_SIGNED(0);
            BNN_SIGNED(1);
            BNN_SIGNED(2);
            BNN_SIGNED(3);
            BNN_SIGNED(4);
            BNN_SIGNED(5);
            BNN_SIGNED(6);
            BNN_SIGNED(7);
        }
        switch (filters - o < 8 ? filters - o : 8) {
        case 8: v[o + 7] = s7; /* fall through */
        case 7: v[o + 6] = s6; /* fall through */
        case 6: v[o + 5] = s5; /* fall through */
        case 5: v[o + 4] = s4; /* fall through */
        case 4: v[o + 3] = s3; /* fall through */
        case 3: v[o + 2] = s2; /* fall through */
        case 2: v[o + 1] = s1; /* fall through */
        default: v[o] = s0;
        }
    }
}
#undef BNN_SIGNED
