/* needs transpose */
/* The inputs of 32 output pixels from p on, a word a tap and channel, bit l of pixel p + l: first n
   words as they are, then n words as a weight of -1 sees them. In the padding both are 0 for even
   channels and 1 for odd ones, so that of an even number of channels half differ from any weights:
   their products sum to 0. */
static void bnn_planes(const bnn_window *g, const bnn_u32 *x, int width, int pixels, int p, int n,
                       bnn_u32 *planes, bnn_u32 *room)
{
    const int words = (g->channels + 31) / 32;
    bnn_u32 *to = planes;
    int i, j, k, l, c;
    memset(planes, 0, 2u * (size_t)n * sizeof *planes);
    BNN_ROLLED for (i = 0; i < g->kh; i++)
        BNN_ROLLED for (j = 0; j < g->kw; j++)
            BNN_ROLLED for (k = 0; k < words; k++) {
                const int last = g->channels - 32 * k, end = last < 32 ? last : 32;
                int y = p / width * g->stride - g->pad + i, z = p % width * g->stride - g->pad + j;
                const int over = width * g->stride - g->pad + j;
                uint32_t valid = 0;
                BNN_ROLLED for (l = 0; l < 32; l++) {
                    const int inside = p + l < pixels && y >= 0 && y < g->height && z >= 0 && z < g->width;
                    room[l] = inside ? x[((int32_t)y * g->width + z) * words + k] : 0xaaaaaaaau;
                    valid |= (uint32_t)inside << l;
                    z += g->stride;
                    if (z == over) {
                        z -= width * g->stride;
                        y += g->stride;
                    }
                }
                bnn_transpose(room);
                BNN_ROLLED for (c = 0; c < end; c++, to++) {
                    to[0] = room[c];
                    to[n] = room[c] ^ valid;
                }
            }
}
