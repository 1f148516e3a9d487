static void bnn_scale(bnn_f32 *v, const bnn_f32 *scale, int n)
{
    int c;
    for (c = 0; c < n; c++)
        v[c] *= scale[c];
}
