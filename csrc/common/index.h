// The index mathematics that CPU and GPU share: which pixels a block has, and which blocks a tile pairs.
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

  // The mask of a partial block: whether its pixel number `offset` exists.
  SRPKD_HOST_DEVICE constexpr bool holds(int64_t offset) const { return offset < size; }
};

SRPKD_HOST_DEVICE constexpr Block block_at(int64_t block, int64_t block_size, int64_t pixels) {
  const int64_t begin = block * block_size, left = pixels - begin;
  return {begin, left < block_size ? left : block_size};
}

// A tile of the relation matrices: the rows of one block against the columns of another, or of the same.
struct Tile {
  int64_t row, column, round;  // row >= column

  // Every tile but those on the diagonal stands for its mirror image above the diagonal too.
  SRPKD_HOST_DEVICE constexpr bool mirrored() const { return row != column; }
};

SRPKD_HOST_DEVICE constexpr int64_t tile_count(int64_t blocks) { return blocks * (blocks + 1) / 2; }

// The triangle map: index in [0, tile_count(blocks)) -> the tile, each pair of blocks once.
//
// Round r = 0 .. blocks - 1 holds the pairs whose numbers add up to r modulo `blocks`: an antidiagonal, wrapped around.
// For every block there is exactly one partner that completes the sum, so a round meets each block once: its tiles
// touch disjoint rows of U and may run side by side, and a block's contributions come in the order of the rounds.
// Two rounds together have blocks + 1 tiles, the even one blocks / 2 + 1 of them: no square root is needed.
SRPKD_HOST_DEVICE constexpr Tile tile_at(int64_t index, int64_t blocks) {
  const int64_t even = blocks / 2 + 1;
  const int64_t place = index % (blocks + 1), odd = place >= even;
  const int64_t round = index / (blocks + 1) * 2 + odd, step = place - odd * even;
  const int64_t one = (round + odd) / 2 + step, other = round / 2 - step;  // they add up to the round
  const int64_t a = one < blocks ? one : one - blocks, b = other < 0 ? other + blocks : other;
  return a < b ? Tile{b, a, round} : Tile{a, b, round};
}

}  // namespace srpkd
