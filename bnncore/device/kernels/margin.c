/* By how much the largest leads the second; one alone leads by far. */
static float bnn_margin(const bnn_f32 *z, int n)
{
    float first = -3.0e38f, second = -3.0e38f;
    int c;
    BNN_ROLLED for (c = 0; c < n; c++)
        if (z[c] > first) {
            second = first;
            first = z[c];
        } else if (z[c] > second)
            second = z[c];
    return first - second;
}
