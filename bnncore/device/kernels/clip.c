static void bnn_clip(bnn_f32 *v, float low, float high, int n)
{
    int c;
    for (c = 0; c < n; c++)
        v[c] = v[c] < low ? low : v[c] > high ? high : v[c];
}
