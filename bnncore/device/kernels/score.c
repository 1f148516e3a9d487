/* Scores of the members so far. */
static void bnn_score(bnn_f32 *scores, const bnn_f32 *sums, float divisor, const float *bias, int n)
{
    int c;
    BNN_ROLLED for (c = 0; c < n; c++) {
        const float mean = sums[c] / divisor;
        scores[c] = bias ? mean + bias[c] : mean;
    }
}
