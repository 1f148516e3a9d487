/* e^x for x <= 0, to about float's precision. */
static float bnn_exp(float x)
{
    const float log2e = 1.44269504f;
    const int n = x < -87.0f ? -126 : (int)(x * log2e - 0.5f);
    const float high = (float)n * 0.693359375f, low = (float)n * -2.12194440e-4f;
    const float r = x < -87.0f ? 0.0f : (x - high) - low;
    const uint32_t bits = (uint32_t)(n + 127) << 23;
    float power, p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* to[c] += weight * softmax(z)[c] */
static void bnn_softmax(bnn_f32 *to, const bnn_f32 *z, float weight, int n)
{
    float most = z[0], sum = 0.0f;
    int c;
    BNN_ROLLED for (c = 1; c < n; c++)
        most = z[c] > most ? z[c] : most;
    BNN_ROLLED for (c = 0; c < n; c++)
        sum += bnn_exp(z[c] - most);
    BNN_ROLLED for (c = 0; c < n; c++)
        to[c] += weight * bnn_exp(z[c] - most) / sum;
}
