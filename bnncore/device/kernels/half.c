/* Half precision to float, exactly, subnormal numbers too: the bits in a float's places are those of
   a number 2^-112 times as large. Weights are finite. */
static float bnn_half(uint16_t h)
{
    const uint32_t bits = (uint32_t)(h & 0x8000u) << 16 | (uint32_t)(h & 0x7fffu) << 13;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f * 5.192296858534828e33f;
}
