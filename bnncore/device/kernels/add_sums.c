static void bnn_add_sums(bnn_f32 *v, const bnn_i32 *x, int n)
{
    int c;
    for (c = 0; c < n; c++)
        v[c] += (float)x[c];
}
