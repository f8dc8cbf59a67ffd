// The epilogue for processors with AVX-512, selected at run time, so that the binary stays portable.
#include "epilogue.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define SRPKD_TARGET avx512
#define SRPKD_VECTOR_BYTES 64
#include "epilogue_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
