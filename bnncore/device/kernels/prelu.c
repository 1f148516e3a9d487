/* x if x >= 0 else slope x; one slope (step 0) or one a channel (step 1). */
static void bnn_prelu(bnn_f32 *v, const bnn_f32 *slope, int step, int n)
{
    int c;
    for (c = 0; c < n; c++, slope += step)
        if (!(v[c] >= 0.0f))
            v[c] *= *slope;
}
