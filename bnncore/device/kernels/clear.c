static void bnn_clear(bnn_f32 *v, int n)
{
    int c;
    for (c = 0; c < n; c++)
        v[c] = 0.0f;
}
