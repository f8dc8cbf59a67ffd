// What the CPU code shares: blocks of pixels of features with any strides, and threads that claim their work.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>

#include "../common/index.h"

namespace srpkd::cpu {

using at::Tensor;

// The pixels of a block, of one image's features (N, C): a view, whatever the strides.
inline Tensor rows_of(const Tensor& features, Block block) {
  return features.as_strided({block.size, features.size(1)}, features.strides(),
                             features.storage_offset() + block.begin * features.stride(0));
}

// Whether the products can read features (B, N, C) where they are: in the type that sums are kept in, and contiguous
// along the pixels (NCHW) or the channels (tokens, channels_last).
inline bool in_place(const Tensor& features, at::ScalarType type) {
  return features.scalar_type() == type && (features.stride(1) == 1 || features.stride(2) == 1);
}

// A block (size, C) where it is, if there is no buffer for it; else a copy there, contiguous along the same dimension.
inline Tensor loaded(const Tensor& block, const Tensor& buffer) {
  if (!buffer.defined()) return block;
  const int64_t rows = block.size(0), channels = block.size(1);
  const bool by_channel = block.stride(0) < block.stride(1);
  return buffer.as_strided({rows, channels}, {by_channel ? 1 : channels, by_channel ? rows : 1}).copy_(block);
}

inline int64_t workers_for(int64_t claims) { return std::min<int64_t>(at::get_num_threads(), claims); }

// Calls work(claim, worker, failed) for every claim in [0, claims), claimed in this order by as many threads as there
// are. Nobody waits for a thread that the system has put aside, but at the end. `failed` turns true when a call throws.
template <typename Work>
void for_each_claim(int64_t claims, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  at::parallel_for(0, workers_for(claims), 1, [&](int64_t worker, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // it is per thread
    try {
      for (int64_t claim; !failed && (claim = next++) < claims;) work(claim, worker, failed);
    } catch (...) {
      failed = true;
      throw;
    }
  });
}

}  // namespace srpkd::cpu
