/* Ones from bit `from` on up to before bit `to`, as far as they lie in a word. */
static uint32_t bnn_lanes(int from, int to)
{
    from = from < 0 ? 0 : from;
    to = to > 32 ? 32 : to;
    return from < to ? (0xffffffffu >> (32 - (to - from))) << from : 0;
}
