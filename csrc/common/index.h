// Index arithmetic shared by CPU and GPU: the pixels of a block, and the pair of blocks of a tile.
// Free of torch, and constexpr throughout, so that it runs on the device, on the host and in tests.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SRPKD_HOST_DEVICE __host__ __device__
#else
#define SRPKD_HOST_DEVICE
#endif

namespace srpkd {

SRPKD_HOST_DEVICE constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

SRPKD_HOST_DEVICE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// The pixels [begin, begin + size) of one block; the last block of an image may be short.
struct Block {
  int64_t begin, size;
};

SRPKD_HOST_DEVICE constexpr Block block_at(int64_t block, int64_t block_size, int64_t pixels) {
  const int64_t begin = block * block_size, left = pixels - begin;
  return {begin, left < block_size ? left : block_size};
}

// A tile of the relation matrices: the rows of one block and the columns of the same or another block.
struct Tile {
  int64_t row, column, round;  // row >= column

  // A tile below the diagonal also represents its mirror image above it.
  SRPKD_HOST_DEVICE constexpr bool mirrored() const { return row != column; }
};

// The number of tiles of a symmetric matrix that are computed: on the diagonal and on one side of it.
template <typename Integer>
SRPKD_HOST_DEVICE constexpr Integer tile_count(Integer blocks) {
  return blocks * (blocks + 1) / 2;
}

// Maps an index in [0, tile_count(blocks)) to a tile of the lower triangle, each pair of blocks once.
//
// Round r = 0 .. blocks - 1 contains the pairs whose indices sum to r modulo `blocks`: an antidiagonal, wrapped around.
// Each block has exactly one partner for that sum, so a round contains each block once: its tiles update disjoint rows
// of U and may run in parallel, and the contributions to a block come in the order of the rounds.
// Two consecutive rounds have blocks + 1 tiles, the even one blocks / 2 + 1 of them, so no square root is needed.
SRPKD_HOST_DEVICE constexpr Tile tile_at(int64_t index, int64_t blocks) {
  const int64_t even = blocks / 2 + 1;
  const int64_t place = index % (blocks + 1), odd = place >= even;
  const int64_t round = index / (blocks + 1) * 2 + odd, step = place - odd * even;
  const int64_t one = (round + odd) / 2 + step, other = round / 2 - step;  // one + other == round
  const int64_t a = one < blocks ? one : one - blocks, b = other < 0 ? other + blocks : other;
  return a < b ? Tile{b, a, round} : Tile{a, b, round};
}

}  // namespace srpkd
