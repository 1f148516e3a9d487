/* v[o] = sum over c of a[c] w[c][o]; eight filters at a time, so that their sums stay in registers. */
static void bnn_products_i8(bnn_f32 *v, const bnn_f32 *a, const int8_t *w, int n, int filters)
{
    int c, o;
    for (o = 0; o + 8 <= filters; o += 8, v += 8, w += 8) {
        const int8_t *u = w;
        float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f, s4 = 0.0f, s5 = 0.0f, s6 = 0.0f, s7 = 0.0f;
        for (c = 0; c < n; c++, u += filters) {
            const float x = a[c];
            s0 += x * (float)u[0];
            s1 += x * (float)u[1];
            s2 += x * (float)u[2];
            s3 += x * (float)u[3];
            s4 += x * (float)u[4];
            s5 += x * (float)u[5];
            s6 += x * (float)u[6];
            s7 += x * (float)u[7];
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
    for (; o < filters; o++, v++, w++) {
        float s0 = 0.0f;
        for (c = 0; c < n; c++)
            s0 += a[c] * (float)w[(int32_t)c * filters];
        v[0] = s0;
    }
}
