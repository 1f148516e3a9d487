static void bnn_relu(bnn_f32 *v, int n)
{
    int c;
    for (c = 0; c < n; c++)
        v[c] = v[c] < 0.0f ? 0.0f : v[c];
}
