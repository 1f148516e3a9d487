/* For targets whose compiler comes without a libc: what the kernels use of string.h. */
#ifndef BNN_STRING_H
#define BNN_STRING_H
#include <stddef.h>
void *memcpy(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);
#endif
