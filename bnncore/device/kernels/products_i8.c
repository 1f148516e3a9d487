/* v[o] = sum over c of a[c] w[c][o]; four filters at a time, so that their sums stay in registers. */
static void bnn_products_i8(bnn_f32 *v, const bnn_f32 *a, const int8_t *w, int n, int filters)
{
    int c, o;
    for (o = 0; o + 4 <= filters; o += 4, v += 4, w += 4) {
        const int8_t *u = w;
        float p = 0.0f, q = 0.0f, r = 0.0f, s = 0.0f;
        for (c = 0; c < n; c++, u += filters) {
            const float x = a[c];
            p += x * (float)u[0];
            q += x * (float)u[1];
            r += x * (float)u[2];
            s += x * (float)u[3];
        }
        v[0] = p;
        v[1] = q;
        v[2] = r;
        v[3] = s;
    }
    for (; o < filters; o++, v++, w++) {
        float p = 0.0f;
        for (c = 0; c < n; c++)
            p += a[c] * (float)w[(int32_t)c * filters];
        v[0] = p;
    }
}
