static void bnn_load(bnn_f32 *v, const bnn_f32 *x, int n)
{
    int c;
    for (c = 0; c < n; c++)
        v[c] = x[c];
}
