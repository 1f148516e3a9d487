/* Which of 32 counts are at most t: word k of sums holds bits k. */
static uint32_t bnn_at_most(const uint32_t *sums, int planes, int t)
{
    uint32_t yes = 0xffffffffu;
    int k;
    if (t < 0)
        return 0;
    BNN_ROLLED for (k = 0; k < planes; k++)
        yes = t >> k & 1 ? yes | ~sums[k] : yes & ~sums[k];
    return yes;
}
