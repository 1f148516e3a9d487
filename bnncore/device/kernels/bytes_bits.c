/* needs window_bytes */
/* 32 pixels of a binary convolution of bytes, filters of a pixel together. Two pixels share a word,
   16 bits each. Three inputs have eight sums of some of them, which the weights pick from a table:
   those of weight 1 twice, less all, is what a filter gives. A word of weights holds eight triples. */
static void bnn_bytes_bits(const bnn_window *g, const uint8_t *image, const int16_t *zero, int width,
                           int pixels, int q, const uint32_t *w, int filters, int words,
                           bnn_u32 *lanes, bnn_u32 *table, bnn_i16 *room, bnn_i16 *to)
{
    const int row = g->kw * g->channels, taps = g->kh * row, triples = (taps + 2) / 3;
    int p, i, k, o;
    for (k = taps; k < 3 * triples; k++)
        lanes[k] = 0;
    for (p = q; p < q + 32 && p < pixels; p += 2, to += 2 * filters) {
        const int oy = p / width, ox = p % width, next = p + 1 < pixels ? p + 1 : p;
        const int y = oy * g->stride - g->pad, z = ox * g->stride - g->pad;
        const bnn_u32 *a = lanes;
        const uint32_t *u = w;
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
        for (o = 0; o < filters; o++, u += words) {
            const uint32_t *v = u;
            uint32_t sum = 0, x;
            t = table;
            for (k = triples; k >= 8; k -= 8, t += 64) {
                x = *v++;
                sum += t[x & 7u] + t[8 + (x >> 4 & 7u)] + t[16 + (x >> 8 & 7u)];
                sum += t[24 + (x >> 12 & 7u)] + t[32 + (x >> 16 & 7u)] + t[40 + (x >> 20 & 7u)];
                sum += t[48 + (x >> 24 & 7u)] + t[56 + (x >> 28)];
            }
            if (k)
                for (x = *v; k; k--, t += 8, x >>= 4)
                    sum += t[x & 7u];
            to[o] = (bnn_i16)(2 * (int32_t)(sum & 0xffffu) - (int32_t)(all & 0xffffu));
            to[filters + o] = (bnn_i16)(2 * (int32_t)(sum >> 16) - (int32_t)(all >> 16));
        }
    }
}
