static void bnn_to_float(bnn_f32 *v, const bnn_i32 *s, int n)
{
    int c;
    for (c = 0; c < n; c++)
        v[c] = (float)s[c];
}
