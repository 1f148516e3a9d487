static float bnn_prelu(float x, float slope)
{
    return x >= 0.0f ? x : x * slope;
}
