/* needs transpose */
/* Up to 32 channels of up to 32 pixels, a word a channel, as word k of each pixel. */
static void bnn_rows_of_bits(bnn_u32 *room, int channels, int pixels, uint32_t flip, bnn_u32 *to,
                             int k, int words)
{
    int l;
    BNN_ROLLED for (l = channels; l < 32; l++)
        room[l] = 0;
    bnn_transpose(room);
    BNN_ROLLED for (l = 0; l < 32 && l < pixels; l++)
        to[l * words + k] = room[l] ^ flip;
}
