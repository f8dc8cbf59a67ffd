// What the wgmma kernels cover. Free of torch, nvcc and the headers of CUDA.
#pragma once

#include "../types.h"
#include "work.h"

namespace srpkd::cuda::sm90 {

constexpr int TILE = 128;                // pixels in a block
constexpr int GROUP = 64;                // channels in a group
constexpr int SHARED_LIMIT = 227 << 10;  // bytes of a thread block

struct Problem {
  int images, pixels, student_channels, teacher_channels;
  Precision precision;
  bool grad;
  Normalize normalize;
  Distance distance;
  float delta;
  bool rectify, with_h;  // with_h: the gradient has terms from the norms
};

// Returns why the kernels do not cover a problem, or null if they do.
inline const char* uncovered_reason(const Problem& problem, const Device& device) {
  if (device.shared_of_block < SHARED_LIMIT) return "a GPU with less than 227 KB of shared memory for a thread block";
  if (problem.rectify) return "rectify=True";
  if (problem.student_channels > 256) return "a student with more than 256 channels";
  if (problem.teacher_channels > 1024) return "a teacher with more than 1024 channels";
  if (!is_divisible(int64_t{problem.images} * ceil_div(problem.student_channels, GROUP), problem.pixels, TILE,
                    device.multiprocessors))
    return "features with more than 2^19 pixels, or more than 2^16 images";
  return nullptr;
}

}  // namespace srpkd::cuda::sm90
