/* needs transpose */
/* Eight words, bit planes of 32 numbers, in place: byte b of word r becomes number 8 b + r. */
static void bnn_bytes(bnn_u32 *a)
{
    bnn_swap(a, 8, 4, 0x0f0f0f0fu);
    bnn_swap(a, 8, 2, 0x33333333u);
    bnn_swap(a, 8, 1, 0x55555555u);
}
