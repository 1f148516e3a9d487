/* Rows of bits: 1 where any of a window's is; where turn is 1, where all are. */
static void bnn_maxpool_bits(const bnn_window *g, const bnn_u32 *x, int oy, int ox, const bnn_u32 *turn, int n, bnn_u32 *row)
{
    int i, j, k;
    BNN_ROLLED for (k = 0; k < n; k++)
        row[k] = 0;
    BNN_ROLLED for (i = 0; i < g->kh; i++) {
        const int y = oy * g->stride - g->pad + i;
        BNN_ROLLED for (j = 0; j < g->kw; j++) {
            const int z = ox * g->stride - g->pad + j;
            if (y < 0 || y >= g->height || z < 0 || z >= g->width)
                continue;
            BNN_ROLLED for (k = 0; k < n; k++)
                row[k] |= x[((int32_t)y * g->width + z) * n + k] ^ (turn ? turn[k] : 0);
        }
    }
    if (turn)
        BNN_ROLLED for (k = 0; k < n; k++)
            row[k] ^= turn[k];
}
