static void bnn_vote(bnn_f32 *sums, const bnn_f32 *z, float weight, int n)
{
    int c;
    BNN_ROLLED for (c = 0; c < n; c++)
        sums[c] += weight * z[c];
}
