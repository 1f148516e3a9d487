/* Blocks of j bits change places between two words. */
#define BNN_SWAP(a, b, j, mask)                              \
    do {                                                     \
        const uint32_t t_ = ((a) >> (j) ^ (b)) & (mask);     \
        (b) ^= t_;                                           \
        (a) ^= t_ << (j);                                    \
    } while (0)

/* Eight words, in place: of each byte of theirs, bit c of word r becomes bit r of word c. Of bit
   planes of 32 numbers byte b of word r becomes number 8 b + r. */
static void bnn_bytes(bnn_u32 *x)
{
    uint32_t a = x[0], b = x[1], c = x[2], d = x[3], e = x[4], f = x[5], g = x[6], h = x[7];
    BNN_SWAP(a, e, 4, 0x0f0f0f0fu);
    BNN_SWAP(b, f, 4, 0x0f0f0f0fu);
    BNN_SWAP(c, g, 4, 0x0f0f0f0fu);
    BNN_SWAP(d, h, 4, 0x0f0f0f0fu);
    BNN_SWAP(a, c, 2, 0x33333333u);
    BNN_SWAP(b, d, 2, 0x33333333u);
    BNN_SWAP(e, g, 2, 0x33333333u);
    BNN_SWAP(f, h, 2, 0x33333333u);
    BNN_SWAP(a, b, 1, 0x55555555u);
    BNN_SWAP(c, d, 1, 0x55555555u);
    BNN_SWAP(e, f, 1, 0x55555555u);
    BNN_SWAP(g, h, 1, 0x55555555u);
    x[0] = a, x[1] = b, x[2] = c, x[3] = d, x[4] = e, x[5] = f, x[6] = g, x[7] = h;
}

/* 32 words: bit c of word r becomes bit r of word c. */
static void bnn_transpose(bnn_u32 *x)
{
    int k;
    BNN_ROLLED for (k = 0; k < 8; k++) {
        uint32_t a = x[k], b = x[k + 8], c = x[k + 16], d = x[k + 24];
        BNN_SWAP(a, c, 16, 0x0000ffffu);
        BNN_SWAP(b, d, 16, 0x0000ffffu);
        BNN_SWAP(a, b, 8, 0x00ff00ffu);
        BNN_SWAP(c, d, 8, 0x00ff00ffu);
        x[k] = a, x[k + 8] = b, x[k + 16] = c, x[k + 24] = d;
    }
    BNN_ROLLED for (k = 0; k < 32; k += 8)
        bnn_bytes(x + k);
}
