// The loaders of a thread block: two threads that start all loads of features and scales. Free of torch.
#pragma once

#if defined(SRPKD_EMULATION)
#include "sm90_primitives.h"  // tests/csrc/cuda_emulation
#else
#include "primitives.cuh"
#endif
#include "plan.h"
#include "sums.cuh"

namespace srpkd::cuda::sm90 {

// What all roles of a thread block know.
template <class C>
struct Role {
  const Params& p;
  const Address shared = shared_memory();
  const int others = p.teacher_groups + p.student_groups - 1;  // groups of channels besides the last of a tile

  SRPKD_DEVICE explicit Role(const Params& params) : p(params) {}

  // A member of the current segment, which the loader of the rows has published: see Published.
  SRPKD_DEVICE int published(int member) const { return load_shared<int>(shared + C::SEGMENT + 4 * member); }
};

// The ints that describe a segment in shared memory. The others keep them there rather than in registers.
struct Published {
  // image: of the batch, or -1 after the last segment; parity: of the barriers that change once in each segment;
  // h_factor: the bits of a float, what turns sums of h into its unit in global memory
  enum Member { image, split, row, first, end, part, parity, h_factor };
};

// The ints of a loader's walk in shared memory: the first four are the state of Segments; then a counter, and the image
// of the batch and the group of channels of the current segment.
constexpr int WALK_COUNT = 4, WALK_IMAGE = 5, WALK_SPLIT = 6, WALK_BYTES = 32;

// A slot of the ring, and the parity of its phase.
struct Cursor {
  int slot = 0, parity = 0;

  SRPKD_DEVICE void advance(int slots) {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

// --- the loaders, one thread each ------------------------------------------------------------------------------------

template <class C>
struct Loader : Role<C> {
  using Role<C>::p, Role<C>::shared, Role<C>::others;

  SRPKD_DEVICE explicit Loader(const Params& params) : Role<C>(params) {}

  // Moves to the next segment. The state of the walk is in shared memory, since 24 registers are few.
  SRPKD_DEVICE bool next(Segment& segment, Address state) const {
    Segments walk(p.work, block_index(0));
    struct alignas(16) State {
      int group, left, image, row;
    };
    const State before = load_shared<State>(state);
    walk.group = before.group, walk.left = before.left, walk.image = before.image, walk.row = before.row;
    if (!walk.next(segment)) return false;
    store_shared(state, State{walk.group, walk.left, walk.image, walk.row});
    store_shared(state + 4 * WALK_IMAGE, segment.image / p.channel_splits);
    store_shared(state + 4 * WALK_SPLIT, segment.image % p.channel_splits);
    return true;
  }
  static SRPKD_DEVICE void start_walk(Address state) {
    for (int i = 0; i <= WALK_COUNT; ++i) store_shared(state + 4 * i, i ? 0 : -1);
  }
  // Counts up and returns the number before.
  static SRPKD_DEVICE int count(Address state) {
    const int before = load_shared<int>(state + 4 * WALK_COUNT);
    store_shared(state + 4 * WALK_COUNT, before + 1);
    return before;
  }

  // Starts to load one term of a group of channels of a block of pixels. Group number `at` of a tile: the teacher's
  // come first, the last is the student's whose U is computed. Both are rotated equally, so that equal features give
  // bit-identical sums. The image is that of the walk's segment.
  SRPKD_DEVICE void load(Address walk, int at, int term, int block, Address to, Address barrier) const {
    const int image = load_shared<int>(walk + 4 * WALK_IMAGE), split = load_shared<int>(walk + 4 * WALK_SPLIT);
    const bool student = at >= p.teacher_groups;
    const int groups = student ? p.student_groups : p.teacher_groups;
    int group = at - (student ? p.teacher_groups : 0);
    if (p.channel_splits > 1) group = (group + (split + 1) % p.student_groups) % groups;
    const TensorMap* map = student ? &p.student : &p.teacher;
    const int index = image * C::TERMS + term;
    if constexpr (C::PIXELS_ADJACENT) {
      load_box(to, map, block * TILE, group * GROUP, index, barrier);
      load_box(to + PANEL, map, block * TILE + 64, group * GROUP, index, barrier);
    } else {
      load_box(to, map, group * GROUP, block * TILE, index, barrier);
    }
  }
};

// Loads what stays of the row block, and publishes the segments.
template <class C>
struct RowLoader : Loader<C> {
  using Loader<C>::p, Loader<C>::shared, Loader<C>::others;

  SRPKD_DEVICE explicit RowLoader(const Params& params) : Loader<C>(params) {}

  SRPKD_DEVICE void publish(int member, int value) const { store_shared(shared + C::SEGMENT + 4 * member, value); }

  SRPKD_DEVICE void load_rows(int at) const {
    const bool last = at == others;
    const Address barrier = shared + C::ROWS_FULL + 8 * (last ? MAX_CHUNKS : at);
    const Address to = shared + (last ? C::ROWS : C::CHUNKS + at * C::TERMS * CHUNK);
    arrive_expecting(barrier, C::TERMS * CHUNK);
#pragma unroll 1
    for (int term = 0; term < C::TERMS; ++term)
      this->load(shared + C::WALKS, at, term, this->published(Published::row), to + term * CHUNK, barrier);
  }

  SRPKD_DEVICE void run() const {
    const Address walk = shared + C::WALKS;
    this->start_walk(walk);
#pragma unroll 1
    for (Segment segment; this->next(segment, walk);) {
      const int parity = this->count(walk) & 1;
      wait(shared + C::ROWS_EMPTY, parity ^ 1);
      publish(Published::image, load_shared<int>(walk + 4 * WALK_IMAGE));
      publish(Published::split, load_shared<int>(walk + 4 * WALK_SPLIT));
      publish(Published::row, segment.row);
      publish(Published::first, segment.first);
      publish(Published::end, segment.end);
      publish(Published::part, block_index(0) - owners_of(p.work, segment.image, segment.row).first);
      publish(Published::parity, parity);
      const float power = load_global_coherent(p.powers + this->published(Published::image));
      publish(Published::h_factor,
              static_cast<int>(as_bits(unit_of_sums(C::SYMMETRIC, power) * p.sum_factor * p.h_scale)));
      arrive(shared + C::SEGMENT_FULL);
#pragma unroll 1
      for (int at = 0; at < p.resident; ++at) load_rows(at);
      load_rows(others);
    }
    wait(shared + C::ROWS_EMPTY, (this->count(walk) & 1) ^ 1);
    publish(Published::image, -1);
    arrive(shared + C::SEGMENT_FULL);
  }
};

// Loads the column blocks, and those chunks of the row block that do not stay.
template <class C>
struct ColumnLoader : Loader<C> {
  using Loader<C>::p, Loader<C>::shared, Loader<C>::others;
  Cursor ring{};

  SRPKD_DEVICE explicit ColumnLoader(const Params& params) : Loader<C>(params) {}

  SRPKD_DEVICE void load_into_ring(int at, int term, int block) {
    const Address base = opaque(shared);
    wait(base + C::RING_EMPTY + 8 * ring.slot, ring.parity ^ 1);
    const Address barrier = base + C::RING_FULL + 8 * ring.slot;
    arrive_expecting(barrier, CHUNK);
    this->load(base + C::WALKS + WALK_BYTES, at, term, block,
               base + C::CHUNKS + (p.resident * C::TERMS + ring.slot) * CHUNK, barrier);
    ring.advance(p.slots);
  }

  SRPKD_DEVICE void load_last(int column) const {
    constexpr int SCALES = TILE * sizeof(typename C::Scale);
    const Address base = opaque(shared);
    const int tile = this->count(base + C::WALKS + WALK_BYTES), stage = tile % C::STAGES;
    wait(base + C::COLUMNS_EMPTY + 8 * stage, (tile / C::STAGES & 1) ^ 1);
    const Address barrier = base + C::COLUMNS_FULL + 8 * stage;
    arrive_expecting(barrier, C::TERMS * CHUNK + SCALES);
    const int image = load_shared<int>(base + C::WALKS + WALK_BYTES + 4 * WALK_IMAGE);
    const auto* const scales = static_cast<const typename C::Scale*>(p.scales);
    load_bulk(base + C::SCALES + stage * SCALES, scales + (int64_t{image} * p.work.blocks + column) * TILE, SCALES,
              barrier);
#pragma unroll 1
    for (int term = 0; term < C::TERMS; ++term)
      this->load(base + C::WALKS + WALK_BYTES, others, term, column,
                 base + C::COLUMNS + (stage * C::TERMS + term) * CHUNK, barrier);
  }

  SRPKD_DEVICE void load_tile(int row, int column) {
#pragma unroll 1
    for (int at = 0; at < others; ++at)
#pragma unroll 1
      for (int term = 0; term < C::TERMS; ++term)
#pragma unroll 1
        for (int of_columns = at < p.resident; of_columns < 2; ++of_columns)
          load_into_ring(at, term, of_columns ? column : row);
    load_last(column);
  }

  SRPKD_DEVICE void run() {
    const Address walk = shared + C::WALKS + WALK_BYTES;
    this->start_walk(walk);
#pragma unroll 1
    for (Segment segment; this->next(segment, walk);)
#pragma unroll 1
      for (int step = segment.first; step < segment.end; ++step)
        load_tile(segment.row, column_of(p.work.blocks, segment.row, step));
  }
};

}  // namespace srpkd::cuda::sm90
