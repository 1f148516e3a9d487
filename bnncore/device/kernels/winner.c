/* The class of the largest score; ties go to the larger doubt, if there is one, then to the lower
   class. */
static int bnn_winner(const bnn_f32 *scores, const bnn_f32 *doubt, int n)
{
    int c, best = 0;
    BNN_ROLLED for (c = 1; c < n; c++)
        if (scores[c] > scores[best] || (doubt && scores[c] == scores[best] && doubt[c] > doubt[best]))
            best = c;
    return best;
}
