/* What all kernels share. C99 and C++, nothing of libc beyond string.h.

   A map is laid out H W C. Numbers are float, or integers of 8, 16 or 32 bits; bits are words
   of 32 channels of one pixel, channel c in bit c % 32 of word c / 32, spare bits 0; 1 is +1. */
#include <stdint.h>
#include <string.h>

/* One arena holds values of all types, one after another in time. */
#if defined(__GNUC__)
#define BNN_ALIAS __attribute__((may_alias))
#else
#define BNN_ALIAS
#endif
typedef float BNN_ALIAS bnn_f32;
typedef int32_t BNN_ALIAS bnn_i32;
typedef int16_t BNN_ALIAS bnn_i16;
typedef int8_t BNN_ALIAS bnn_i8;
typedef uint32_t BNN_ALIAS bnn_u32;

/* gcc bug 110702: where a loop reads and writes the arena in elements of two sizes, gcc before 14
   (12.4, 13.3) writes through 0 plus an offset, takes that for no write at all, and drops it. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 14
#pragma GCC optimize("no-delete-null-pointer-checks")
#endif

/* Functions that a compiler shall not copy into where they are called. */
#if defined(__GNUC__)
#define BNN_APART __attribute__((noinline))
#else
#define BNN_APART
#endif

/* Functions whose instructions shall stay near the order written: with as many values alive as there
   are registers, gcc's scheduler before their allocation spills them. */
#if defined(__GNUC__) && !defined(__clang__)
#define BNN_ORDERED __attribute__((optimize("no-schedule-insns")))
#else
#define BNN_ORDERED
#endif

/* Loops that a compiler shall leave as they are, for short code, and such as it shall write out. */
#if defined(__clang__)
#define BNN_ROLLED _Pragma("clang loop unroll(disable)")
#define BNN_UNROLLED _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__) && __GNUC__ >= 8
#define BNN_ROLLED /* it leaves most loops anyway, and refuses the pragma for some */
#define BNN_UNROLLED _Pragma("GCC unroll 4")
#else
#define BNN_ROLLED
#define BNN_UNROLLED
#endif

/* A window over a map: of a convolution or a pooling. */
typedef struct {
    int height, width, channels; /* of the input map */
    int kh, kw, stride, pad;
} bnn_window;
