/* needs pack */
static void bnn_sign_f32(bnn_u32 *to, const bnn_f32 *v, int n)
{
    uint32_t word = 0;
    int c;
    for (c = 0; c < n; c++)
        word = bnn_pack(to, word, c, n, v[c] >= 0.0f);
}
