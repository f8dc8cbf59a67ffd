// The epilogue for processors with AVX2, selected at run time, so that the binary stays portable.
#include "epilogue.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define SRPKD_TARGET avx2
#define SRPKD_VECTOR_BYTES 32
#include "epilogue_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
