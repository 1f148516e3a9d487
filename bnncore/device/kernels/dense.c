/* needs FIRST */
/* v[o] = sum over f of w[o][f] x[f]. */
static void bnn_dense_WEIGHT_NUMBER(SUM *v, const bnn_NUMBER *x, const KEPT *w, int features, int outputs)
{
    int f, o;
    BNN_ROLLED for (o = 0; o < outputs; o++, w += features) {
        SUM sum = 0;
        BNN_ROLLED for (f = 0; f < features; f++)
            sum += x[f] * READ(w[f]);
        v[o] = sum;
    }
}
