/* Half precision to float, exactly; subnormal numbers too. */
static float bnn_half(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, low = h & 0x3ffu;
    uint32_t bits = (uint32_t)((h >> 10) & 31u);
    float f;
    if (bits == 0) {
        f = (float)low * (1.0f / 16777216.0f);
        return sign ? -f : f;
    }
    bits = sign | ((bits == 31 ? 255u : bits + 112u) << 23) | (low << 13);
    memcpy(&f, &bits, sizeof f);
    return f;
}
