// The order of the work: which pairs of blocks of pixels a thread block computes, and in which order U is added up.
// Compiles without nvcc.
//
// An image has T blocks of pixels. Row block I visits the column blocks I, I + 1, ... modulo T, half of all, so that
// each unordered pair is visited once. Such a visit is an item; the items of an image are numbered row by row. Images
// form groups, one group after the other; the items of a group are divided evenly among all thread blocks, so that each
// has a contiguous range of them. What a thread block does in one row is a segment.
//
// U of the rows of a segment stays in registers and is stored as a part of its own. U of the column block of an item is
// added to global memory. The additions to one block come in the order of (place of the item in its thread block's
// range, thread block), so results are bit-identical from run to run. Every addition waits only for items of smaller
// places, hence there is no deadlock if all thread blocks are resident.
#pragma once

#include "../types.h"

namespace srpkd::cuda::sm90 {

struct Work {
  int blocks;       // T, of an image
  int images;       // counted once for every 64 channels of U
  int groups;       // of images
  int grid;         // thread blocks
  int copies;       // of the sums over columns: addition number n of a block goes to copy n % copies
  int parts;        // at most so many segments share a row block
  int row_items;    // the largest number of items in a row
  int image_items;  // in an image
};

// Returns the number of column blocks that a row block visits.
SRPKD_HOST_DEVICE constexpr int items_of_row(int blocks, int row) {
  return (blocks + 1) / 2 + (blocks % 2 == 0 && row < blocks / 2);
}

// Returns the number of an item in its image.
SRPKD_HOST_DEVICE constexpr int item_at(int blocks, int row, int step) {
  const int half = (blocks + 1) / 2;  // rows [0, T / 2) have one item more if T is even
  return row * half + step + (blocks % 2 == 0 ? minimum(row, blocks / 2) : 0);
}

struct Item {
  int image, row, step;  // image: in its group
};
SRPKD_HOST_DEVICE constexpr Item locate(const Work& work, int item) {
  const int image = item / work.image_items, at = item - image * work.image_items;
  const int half = (work.blocks + 1) / 2;
  const int longer = work.blocks % 2 == 0 ? work.blocks / 2 * (half + 1) : 0;  // items in rows with one item more
  const int row = at < longer ? at / (half + 1) : (at - longer) / half + (longer ? work.blocks / 2 : 0);
  return {image, row, at - item_at(work.blocks, row, 0)};
}

SRPKD_HOST_DEVICE constexpr int column_of(int blocks, int row, int step) {
  return row + step < blocks ? row + step : row + step - blocks;
}

// Where part `index` begins if `count` things are divided into `parts`, and which part has a thing. In 32 bits, since
// division of 64 bits needs many registers: count * parts is below 2^32, see is_divisible.
SRPKD_HOST_DEVICE constexpr int quotient(int count, int index, int parts) {
  return static_cast<int>(static_cast<uint32_t>(count) * static_cast<uint32_t>(index) / static_cast<uint32_t>(parts));
}
SRPKD_HOST_DEVICE constexpr int inverse_quotient(int thing, int count, int parts) {
  return static_cast<int>(((static_cast<uint32_t>(thing) + 1) * static_cast<uint32_t>(parts) - 1) /
                          static_cast<uint32_t>(count));
}

// The first image of a group, and the number of its items.
struct Group {
  int first, items;
};
SRPKD_HOST_DEVICE constexpr Group group_at(const Work& work, int group) {
  const int first = quotient(work.images, group, work.groups), end = quotient(work.images, group + 1, work.groups);
  return {first, (end - first) * work.image_items};
}
SRPKD_HOST_DEVICE constexpr int group_of(const Work& work, int image) {
  return inverse_quotient(image, work.images, work.groups);
}

// The range of a thread block: items [begin_of(b), begin_of(b + 1)) of a group. And the inverse.
SRPKD_HOST_DEVICE constexpr int begin_of(int block, int items, int grid) { return quotient(items, block, grid); }
SRPKD_HOST_DEVICE constexpr int owner_of(int item, int items, int grid) { return inverse_quotient(item, items, grid); }

// One row of an image, steps [first, end).
struct Segment {
  int image, row, first, end;
};

// The segments of a thread block, in order.
struct Segments {
  const Work& work;
  const int block;
  int group = -1, left = 0;  // items of the group
  int image = 0, row = 0;    // of the next segment, unless it starts a group

  SRPKD_HOST_DEVICE constexpr Segments(const Work& whole, int of_block) : work(whole), block(of_block) {}

  // Moves to the next segment. Returns false if there is none.
  SRPKD_HOST_DEVICE constexpr bool next(Segment& segment) {
    int first = 0;
    while (left == 0) {
      if (++group == work.groups) return false;
      const Group images = group_at(work, group);
      const int begin = begin_of(block, images.items, work.grid);
      left = begin_of(block + 1, images.items, work.grid) - begin;
      const Item item = locate(work, begin);
      image = images.first + item.image, row = item.row, first = item.step;
    }
    const int end = minimum(items_of_row(work.blocks, row), first + left);
    segment = {image, row, first, end};
    left -= end - first;
    if (++row == work.blocks) row = 0, ++image;
    return true;
  }
};

// The place of an item in the order of additions.
struct Place {
  int step, block;

  SRPKD_HOST_DEVICE constexpr bool before(const Place& other) const {
    return step < other.step || (step == other.step && block < other.block);
  }
};
SRPKD_HOST_DEVICE constexpr Place place_of(const Work& work, const Group& group, int image, int row, int step) {
  const int item = (image - group.first) * work.image_items + item_at(work.blocks, row, step);
  const int block = owner_of(item, group.items, work.grid);
  return {item - begin_of(block, group.items, work.grid), block};
}

// Returns how many of the items `first`, `first + stride`, ... of a column block come before the item of `row` and
// `step`. The items of a column block J are those at step 1, 2, ... of the rows J - 1, J - 2, ...: a rank is the sum
// over all `first` in [1, stride].
SRPKD_HOST_DEVICE constexpr int earlier_items(const Work& work, int image, int row, int step, int first, int stride) {
  const Group group = group_at(work, group_of(work, image));
  const Place own = place_of(work, group, image, row, step);
  const int column = column_of(work.blocks, row, step);
  int count = 0;
  for (int other = first; other <= work.blocks / 2; other += stride) {
    const int other_row = column - other + (column < other ? work.blocks : 0);
    if (other < items_of_row(work.blocks, other_row))
      count += place_of(work, group, image, other_row, other).before(own);
  }
  return count;
}

// Returns the number of additions to a column block.
SRPKD_HOST_DEVICE constexpr int additions_to(int blocks, int column) {
  return (blocks - 1) / 2 + (blocks % 2 == 0 && column >= blocks / 2);
}

// The thread blocks of a row: [first, end). Each has items, as a group has at least as many as there are thread blocks.
// Segment number `block - first` of the row is what `block` does.
struct Owners {
  int first, end;
};
SRPKD_HOST_DEVICE constexpr Owners owners_of(const Work& work, int image, int row) {
  const Group group = group_at(work, group_of(work, image));
  const int begin = (image - group.first) * work.image_items + item_at(work.blocks, row, 0);
  return {owner_of(begin, group.items, work.grid),
          owner_of(begin + items_of_row(work.blocks, row) - 1, group.items, work.grid) + 1};
}

// Returns whether `divide` can represent a problem.
inline bool is_divisible(int64_t images, int64_t pixels, int tile, int multiprocessors) {
  const int64_t blocks = ceil_div(pixels, tile);
  return images < 1 << 16 && blocks <= 1 << 12 && tile_count(blocks) * multiprocessors < int64_t{1} << 31;
}

// Divides the work among the multiprocessors, one thread block on each.
inline Work divide(int images, int pixels, int tile, int multiprocessors) {
  constexpr int ITEMS = 16;  // of a thread block in a group, at least: few segments, and images that fit into L2
  Work work{};
  work.blocks = static_cast<int>(ceil_div(pixels, tile)), work.images = images;
  work.row_items = items_of_row(work.blocks, 0), work.image_items = item_at(work.blocks, work.blocks, 0);
  const int64_t groups = int64_t{images} * work.image_items / (int64_t{ITEMS} * multiprocessors);
  work.groups = static_cast<int>(groups < 1 ? 1 : groups < images ? groups : images);
  const int64_t smallest = int64_t{images / work.groups} * work.image_items;
  work.grid = static_cast<int>(smallest < multiprocessors ? smallest : multiprocessors);
  const int own = static_cast<int>(smallest / work.grid < 1 << 20 ? smallest / work.grid : 1 << 20);
  // few items of each thread block are at the same steps: without copies they would often wait for each other
  work.copies = own >= 12 ? 1 : own >= 6 ? 2 : own >= 3 ? 4 : 8;
  work.parts = static_cast<int>(ceil_div(work.row_items - 1, own)) + 1;
  return work;
}

}  // namespace srpkd::cuda::sm90
