/* needs affine */
/* The numbers of one window of the normalised image, 0 in the padding. */
static void bnn_window_image(const bnn_window *g, const uint8_t *x, int oy, int ox,
                             const bnn_f32 *scale, const bnn_f32 *shift, bnn_f32 *to)
{
    int i, j, c;
    BNN_ROLLED for (i = 0; i < g->kh; i++) {
        const int y = oy * g->stride - g->pad + i;
        BNN_ROLLED for (j = 0; j < g->kw; j++, to += g->channels) {
            const int z = ox * g->stride - g->pad + j;
            const int inside = y >= 0 && y < g->height && z >= 0 && z < g->width;
            const uint8_t *pixel = x + (inside ? ((int32_t)y * g->width + z) * g->channels : 0);
            BNN_ROLLED for (c = 0; c < g->channels; c++)
                to[c] = inside ? bnn_affine((float)pixel[c], scale[c], shift[c]) : 0.0f;
        }
    }
}
