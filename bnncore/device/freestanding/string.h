/* For targets whose compiler comes without a libc: what the kernels use of string.h. As with one, a
   copy of a known length need not be a call. */
#ifndef BNN_STRING_H
#define BNN_STRING_H
#include <stddef.h>
void *memcpy(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);
#define memcpy(to, from, n) __builtin_memcpy(to, from, n)
#define memset(to, value, n) __builtin_memset(to, value, n)
#endif
