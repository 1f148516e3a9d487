static void bnn_load_sums(bnn_i32 *s, const bnn_i32 *x, int n)
{
    int c;
    for (c = 0; c < n; c++)
        s[c] = x[c];
}
