// Types shared by all CUDA kernels and their launchers. Compiles without nvcc.
#pragma once

#include <cstdint>

#include "../common/index.h"
#include "../common/relation.h"

namespace srpkd::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The networks, in the order of arrays of both. In sm90/ the student comes first.
enum Network { TEACHER, STUDENT };

// The place of a thread block in the grid of its kernel.
struct BlockIndex {
  int x, y;
};

SRPKD_HOST_DEVICE constexpr int minimum(int a, int b) { return a < b ? a : b; }

// The properties of a GPU that the plans depend on. Memory in bytes; reserved: for each thread block.
struct Device {
  int multiprocessors, shared_of_block;
  int shared_of_multiprocessor = 0, shared_reserved = 0;
  int major = 8;           // of the compute capability
  bool cooperates = true;  // whether it supports cooperative launches
};

// How features are multiplied. tf32x3: three products of floats split into two tf32. On sm_90a, tf32 is one float16
// term of floats, and tf32x3 two.
enum class Precision : int { bf16, fp16, tf32, tf32x3 };

}  // namespace srpkd::cuda
