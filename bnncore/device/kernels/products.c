/* needs FIRST */
/* v[o] = sum over c of a[c] w[c][o]; eight filters at a time, so that their sums stay in registers. */
static void bnn_products_WEIGHT_NUMBER(SUM *v, const bnn_NUMBER *a, const KEPT *w, int n, int filters)
{
    int c, o;
    BNN_ROLLED for (o = 0; o + 8 <= filters; o += 8, v += 8, w += 8) {
        const KEPT *u = w;
        SUM s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
        BNN_ROLLED for (c = 0; c < n; c++, u += filters) {
            const SUM x = a[c];
            s0 += x * READ(u[0]);
            s1 += x * READ(u[1]);
            s2 += x * READ(u[2]);
            s3 += x * READ(u[3]);
            s4 += x * READ(u[4]);
            s5 += x * READ(u[5]);
            s6 += x * READ(u[6]);
            s7 += x * READ(u[7]);
        }
        v[0] = s0;
        v[1] = s1;
        v[2] = s2;
        v[3] = s3;
        v[4] = s4;
        v[5] = s5;
        v[6] = s6;
        v[7] = s7;
    }
    BNN_ROLLED for (; o + 2 <= filters; o += 2, v += 2, w += 2) {
        const KEPT *u = w;
        SUM s0 = 0, s1 = 0;
        BNN_ROLLED for (c = 0; c < n; c++, u += filters) {
            const SUM x = a[c];
            s0 += x * READ(u[0]);
            s1 += x * READ(u[1]);
        }
        v[0] = s0;
        v[1] = s1;
    }
    if (o < filters) {
        SUM s0 = 0;
        BNN_ROLLED for (c = 0; c < n; c++)
            s0 += (SUM)a[c] * READ(w[(int32_t)c * filters]);
        v[0] = s0;
    }
}
