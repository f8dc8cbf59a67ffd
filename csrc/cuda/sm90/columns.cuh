// The warps that compute U of the column blocks from K, which the consumers leave in shared memory, and add it to
// global memory. Free of torch.
#pragma once

#include "loaders.cuh"
#include "sums.cuh"

namespace srpkd::cuda::sm90 {

struct alignas(16) FourFloats {
  float value[4];
};

// The features of the pixels [16 k, 16 k + 16) of a chunk, for products whose sums run over pixels.
template <class C>
SRPKD_DEVICE uint64_t pixels_of(Address chunk, int k) {
  return C::PIXELS_ADJACENT ? k_major(chunk, k) : mn_major(chunk, k);
}

template <class C>
struct Columns : Role<C> {
  using Element = typename C::Element;
  using Role<C>::p, Role<C>::shared;
  static constexpr Major OF_U = C::PIXELS_ADJACENT ? Major::k : Major::mn;

  const int thread = thread_index() % 128, lane = thread % 32;
  int tile = 0, segments = 0;

  SRPKD_DEVICE explicit Columns(const Params& params) : Role<C>(params) {}

  // sum (64 channels x 64 pixels of J) = q_I^T K.
  SRPKD_DEVICE void multiply(float (&sum)[32], int half, Address base) const {
    fence_registers();
#pragma unroll
    for (int term = 0; term < C::TERMS; ++term)
#pragma unroll
      for (int other = 0; other + term < C::TERMS; ++other)
#pragma unroll
        for (int k = 0; k < TILE / 16; ++k) {
          const Address chunk = base + C::ROWS + other * CHUNK;
          const uint64_t features = pixels_of<C>(chunk, k);
          multiply_add_async<Element, OF_U, Major::mn>(
              sum, features, mn_major(base + C::K + (2 * term + half) * CHUNK, k, CHUNK), term + other + k > 0);
        }
    commit_products();
    wait_for_products<0>();
    hold(sum);
  }

  // Hands half of a tile's sums to the adder.
  SRPKD_DEVICE void stage(const float (&sum)[32], int half, Address base) const {
    wait(base + C::STAGING_EMPTY, half ^ 1);
#pragma unroll
    for (int n = 0; n < 8; ++n)
      store_shared(base + C::STAGING + (n * 128 + thread) * 16,
                   FourFloats{{sum[4 * n], sum[4 * n + 1], sum[4 * n + 2], sum[4 * n + 3]}});
    fence_async_proxy();
    sync_warp();
    if (lane == 0) arrive(base + C::STAGING_FULL);
  }

  SRPKD_DEVICE void run() {
#pragma unroll 1
    for (;; ++segments) {
      wait(shared + C::SEGMENT_FULL, segments & 1);
      if (this->published(Published::image) < 0) break;
      const int end = this->published(Published::end);
      wait(shared + C::ROWS_FULL + 8 * MAX_CHUNKS, segments & 1);
#pragma unroll 1
      for (int step = this->published(Published::first); step < end; ++step, ++tile) {
        const Address base = uniform(opaque(shared));
        wait(base + C::K_FULL, tile & 1);
        if (step > 0) {  // otherwise the rows have the whole tile
#pragma unroll
          for (int half = 0; half < 2; ++half) {  // one after the other: 32 registers for sums leave the consumers 208
            float sum[32];
            multiply(sum, half, base);
            if (half == 1 && lane == 0) arrive(base + C::K_EMPTY);
            stage(sum, half, base);
          }
        } else {
          sync_warp();  // a thread that still waits would miss the phase
          if (lane == 0) arrive(base + C::K_EMPTY);
        }
      }
      sync_warp();
      if (lane == 0) arrive(shared + C::ROWS_EMPTY);
    }
  }
};

// Adds what Columns has staged to global memory. One warp.
template <class C>
struct Adder : Role<C> {
  using Role<C>::p, Role<C>::shared;

  const int lane = thread_index() % 32;

  SRPKD_DEVICE explicit Adder(const Params& params) : Role<C>(params) {}

  // Returns how many additions to the column block come before this one.
  SRPKD_DEVICE int rank(int image, int row, int step) const {
    int count = earlier_items(p.work, image, row, step, 1 + lane, 32);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) count += shuffle_xor(count, lanes);
    return count;
  }

  SRPKD_DEVICE void add(int image, int row, int step) const {
    const int earlier = rank(image, row, step);  // while the tile is computed
    if (lane == 0) {
      const int64_t at = (int64_t{earlier % p.work.copies} * p.work.images + image) * p.work.blocks +
                         column_of(p.work.blocks, row, step);
      const int before = earlier / p.work.copies;  // additions to the same copy
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        wait(shared + C::STAGING_FULL, half);
        float* const to = p.U_columns + at * U_BLOCK + half * (U_BLOCK / 2);
        if (before == 0) {  // so that it need not be zero
          store_bulk(to, shared + C::STAGING, CHUNK);
        } else {
          if (half == 0) {
            wait_until_at_least(p.additions + at, before);
            fence_async_proxy_global();
          }
          add_bulk(to, shared + C::STAGING, CHUNK);
        }
        commit_bulk();
        wait_for_bulk_reads<0>();
        arrive(shared + C::STAGING_EMPTY);
      }
      wait_for_bulk<0>();
      fence_async_proxy_global();
      fence_gpu();
      add_release(p.additions + at, 1);
    }
    sync_warp();
  }

  SRPKD_DEVICE void run() const {
#pragma unroll 1
    for (int parity = 0;; parity ^= 1) {
      wait(shared + C::SEGMENT_FULL, parity);
      const int image = this->published(Published::image) * p.channel_splits + this->published(Published::split);
      const int row = this->published(Published::row), end = this->published(Published::end);
      int step = this->published(Published::first);
      const bool any = this->published(Published::image) >= 0;
      sync_warp();
      if (!any) break;
      if (lane == 0) arrive(shared + C::ROWS_EMPTY);  // it needs nothing else of the segment
#pragma unroll 1
      for (step = step > 0 ? step : 1; step < end; ++step) add(image, row, step);
    }
  }
};

}  // namespace srpkd::cuda::sm90
