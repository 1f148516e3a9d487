/* The product is rounded before the sum. */
static float bnn_affine(float x, float scale, float shift)
{
    const float y = x * scale;
    return y + shift;
}
