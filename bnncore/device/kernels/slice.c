/* needs transpose */
/* A map of bits, 32 pixels after another: a word a channel. */
static void bnn_slice(const bnn_u32 *x, int pixels, int channels, bnn_u32 *room, bnn_u32 *flat)
{
    const int words = (channels + 31) / 32;
    int p, k, l, c;
    BNN_ROLLED for (p = 0; p < pixels; p += 32)
        BNN_ROLLED for (k = 0; k < words; k++) {
            const int end = channels - 32 * k < 32 ? channels - 32 * k : 32;
            BNN_ROLLED for (l = 0; l < 32; l++)
                room[l] = p + l < pixels ? x[(int32_t)(p + l) * words + k] : 0;
            bnn_transpose(room);
            BNN_ROLLED for (c = 0; c < end; c++)
                *flat++ = room[c];
        }
}
