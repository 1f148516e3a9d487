/* The first of the largest. */
static int bnn_best(const bnn_f32 *z, int n)
{
    int c, best = 0;
    BNN_ROLLED for (c = 1; c < n; c++)
        if (z[c] > z[best])
            best = c;
    return best;
}
