/* Three words of one weight: one of that weight, one of twice (a carry-save adder). */
#define BNN_ADD(high, low, a, b, c)              \
    do {                                         \
        const uint32_t u_ = (a) ^ (b), c_ = (c); \
        (high) = ((a) & (b)) | (u_ & c_);        \
        (low) = u_ ^ c_;                         \
    } while (0)
