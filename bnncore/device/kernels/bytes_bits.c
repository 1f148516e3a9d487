/* needs window_bytes */
/* 32 pixels of a binary convolution of bytes, pixels of a filter together. Two pixels share a word,
   16 bits each. Three inputs have eight sums of some of them, which the weights pick from a table:
   those of weight 1 twice, less all, is what a filter gives. A weight is where in the tables of eight
   triples the sum of its triple lies. */
static void bnn_bytes_bits(const bnn_window *g, const uint8_t *image, const int16_t *zero, int width,
                           int pixels, int q, const uint8_t *w, int filters,
                           bnn_u32 *lanes, bnn_u32 *table, bnn_i16 *room, bnn_i16 *to)
{
    const int row = g->kw * g->channels, taps = g->kh * row, triples = (taps + 2) / 3;
    int p, i, k, o;
    for (k = taps; k < 3 * triples; k++)
        lanes[k] = 0;
    for (p = q; p < q + 32 && p < pixels; p += 2, to += 2) {
        const int oy = p / width, ox = p % width, next = p + 1 < pixels ? p + 1 : p;
        const int y = oy * g->stride - g->pad, z = ox * g->stride - g->pad;
        const bnn_u32 *a = lanes;
        const uint8_t *u = w;
        bnn_u32 *t = table;
        uint32_t all = 0;
        if (y >= 0 && y + g->kh <= g->height && ox + 1 < width && z >= 0 &&
            z + g->stride + g->kw <= g->width) {
            bnn_u32 *lane = lanes;
            for (i = 0; i < g->kh; i++) {
                const uint8_t *b = image + ((int32_t)(y + i) * g->width + z) * g->channels;
                const uint8_t *c = b + g->stride * g->channels;
                for (k = 0; k < row; k++)
                    *lane++ = b[k] | (uint32_t)c[k] << 16;
            }
        } else {
            bnn_window_bytes(g, image, oy, ox, zero, room);
            for (k = 0; k < taps; k++)
                lanes[k] = (uint32_t)(room[k] & 255);
            bnn_window_bytes(g, image, next / width, next % width, zero, room);
            for (k = 0; k < taps; k++)
                lanes[k] |= (uint32_t)(room[k] & 255) << 16;
        }
        for (k = 0; k < triples; k++, a += 3, t += 8) {
            const uint32_t two = a[0] + a[1], three = two + a[2];
            t[0] = 0;
            t[1] = a[0];
            t[2] = a[1];
            t[3] = two;
            t[4] = a[2];
            t[5] = a[0] + a[2];
            t[6] = a[1] + a[2];
            t[7] = three;
            all += three;
        }
        for (o = 0; o < 32 * filters; o += 32) {
            uint32_t sum = 0;
            t = table;
            for (k = triples; k >= 8; k -= 8, t += 64, u += 8) {
                sum += t[u[0]] + t[u[1]] + t[u[2]] + t[u[3]];
                sum += t[u[4]] + t[u[5]] + t[u[6]] + t[u[7]];
            }
            for (; k; k--)
                sum += t[*u++];
            to[o] = (bnn_i16)(2 * (int32_t)(sum & 0xffffu) - (int32_t)(all & 0xffffu));
            to[o + 1] = (bnn_i16)(2 * (int32_t)(sum >> 16) - (int32_t)(all >> 16));
        }
    }
}
