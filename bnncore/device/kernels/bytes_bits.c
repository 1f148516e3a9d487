/* The bytes of one window, in the padding those of `zero`, put into words from bit `shift` on. */
static void bnn_window_lanes(const bnn_window *g, const uint8_t *x, int oy, int ox,
                             const int16_t *zero, int shift, bnn_u32 *to)
{
    int i, j, c;
    BNN_ROLLED for (i = 0; i < g->kh; i++) {
        const int y = oy * g->stride - g->pad + i;
        BNN_ROLLED for (j = 0; j < g->kw; j++) {
            const int z = ox * g->stride - g->pad + j;
            if (y >= 0 && y < g->height && z >= 0 && z < g->width) {
                const uint8_t *pixel = x + ((int32_t)y * g->width + z) * g->channels;
                BNN_ROLLED for (c = 0; c < g->channels; c++)
                    *to++ |= (uint32_t)pixel[c] << shift;
            } else
                BNN_ROLLED for (c = 0; c < g->channels; c++)
                    *to++ |= (uint32_t)zero[c] << shift;
        }
    }
}

/* 32 pixels of a binary convolution of bytes, pixels of a filter together. Two pixels share a word,
   16 bits each. Three inputs have eight sums of some of them, which the weights pick from a table:
   those of weight 1 twice, less all, is what a filter gives. A weight is where in the tables of eight
   triples the sum of its triple lies. */
static void bnn_bytes_bits(const bnn_window *g, const uint8_t *image, const int16_t *zero, int width,
                           int pixels, int q, const uint8_t *w, int filters,
                           bnn_u32 *lanes, bnn_u32 *table, bnn_i16 *to)
{
    const int row = g->kw * g->channels, taps = g->kh * row, triples = (taps + 2) / 3;
    int p, i, k, o;
    BNN_ROLLED for (k = taps; k < 3 * triples; k++)
        lanes[k] = 0;
    BNN_ROLLED for (p = q; p < q + 32 && p < pixels; p += 2, to += 2) {
        const int oy = p / width, ox = p % width, next = p + 1 < pixels ? p + 1 : p;
        const int y = oy * g->stride - g->pad, z = ox * g->stride - g->pad;
        const bnn_u32 *a = lanes;
        const uint8_t *u = w;
        bnn_u32 *t = table;
        uint32_t all = 0;
        if (y >= 0 && y + g->kh <= g->height && ox + 1 < width && z >= 0 &&
            z + g->stride + g->kw <= g->width) {
            bnn_u32 *lane = lanes;
            BNN_ROLLED for (i = 0; i < g->kh; i++) {
                const uint8_t *b = image + ((int32_t)(y + i) * g->width + z) * g->channels;
                const uint8_t *c = b + g->stride * g->channels;
                BNN_ROLLED for (k = 0; k + 3 <= row; k += 3, lane += 3) {
                    lane[0] = b[k] | (uint32_t)c[k] << 16;
                    lane[1] = b[k + 1] | (uint32_t)c[k + 1] << 16;
                    lane[2] = b[k + 2] | (uint32_t)c[k + 2] << 16;
                }
                BNN_ROLLED for (; k < row; k++)
                    *lane++ = b[k] | (uint32_t)c[k] << 16;
            }
        } else {
            memset(lanes, 0, (size_t)taps * sizeof *lanes);
            bnn_window_lanes(g, image, oy, ox, zero, 0, lanes);
            bnn_window_lanes(g, image, next / width, next % width, zero, 16, lanes);
        }
        BNN_ROLLED for (k = 0; k < triples; k++, a += 3, t += 8) {
            const uint32_t x = a[0], y = a[1], z = a[2];
            t[0] = 0;
            t[1] = x;
            t[2] = y;
            t[3] = x + y;
            t[4] = z;
            t[5] = x + z;
            t[6] = y + z;
            t[7] = x + y + z;
            all += x + y + z;
        }
        BNN_ROLLED for (o = 0; o < 32 * filters; o += 32) {
            uint32_t sum = 0;
            t = table;
            BNN_ROLLED for (k = triples; k >= 8; k -= 8, t += 64, u += 8) {
                sum += t[u[0]] + t[u[1]] + t[u[2]] + t[u[3]];
                sum += t[u[4]] + t[u[5]] + t[u[6]] + t[u[7]];
            }
            BNN_ROLLED for (; k > 0; k--)
                sum += t[*u++];
            sum = (2u * sum + (0x80008000u - all)) ^ 0x80008000u; /* no lane borrows of the other */
            to[o] = (bnn_i16)(sum & 0xffffu);
            to[o + 1] = (bnn_i16)(sum >> 16);
        }
    }
}
