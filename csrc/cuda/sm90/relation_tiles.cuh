// The loss, U and h (TileSums in kernels/formulas.py) on Hopper, by wgmma. Free of torch.
//
// A thread block on each multiprocessor walks over tiles of 128 x 128 pairs of pixels, in the order of work.h. Its
// warpgroups are specialised:
//
//   loaders      Two threads start all loads, by TMA: chunks of 64 channels x 128 pixels of 16 bits. Those of the row
//                block stay in shared memory if they fit; those of the column block pass through a ring.
//   consumers    Two warpgroups with 64 rows each: G_s and G_t by wgmma, then D, P and K on the accumulators, then
//                U_I += K q_J with K from registers. They take turns: while one has the tensor cores, the other is in
//                its elementwise part. If the ring does not hold the chunks of a whole tile, they share them at the
//                same time instead.
//   columns      One warpgroup reads K of both from shared memory, and multiplies U_J = K^T q_I.
//   adder        One warp adds U_J to global memory, in the fixed order of work.h, by bulk copies.
#pragma once

#include "columns.cuh"
#include "epilogue.cuh"
#include "prepare.cuh"

namespace srpkd::cuda::sm90 {

// --- the consumers ---------------------------------------------------------------------------------------------------

template <class C>
struct Consumer : Role<C> {
  using Element = typename C::Element;
  using Role<C>::p, Role<C>::shared, Role<C>::others;
  static constexpr Major FEATURES = C::PIXELS_ADJACENT ? Major::mn : Major::k;  // as operands of G
  static constexpr Major OF_U = C::PIXELS_ADJACENT ? Major::k : Major::mn;      // as operands of U

  // The accumulators leave few registers: everything that can be computed or loaded again is not kept.
  const int half;  // of the rows
  Cursor ring{};
  int tile = 0;

  static SRPKD_DEVICE int lane() { return thread_index() % 32; }
  static SRPKD_DEVICE int warp() { return thread_index() / 32 % 4; }
  SRPKD_DEVICE int row() const { return 64 * half + 16 * warp() + lane() / 4; }  // and the row eight further

  SRPKD_DEVICE Consumer(const Params& params, int of_rows) : Role<C>(params), half(of_rows) {}

  // Arrives once for the warp.
  static SRPKD_DEVICE void arrive_warp(Address barrier) {
    if (elect_one()) arrive(barrier);
  }

  // Waits for the next chunk of the ring and returns its address.
  SRPKD_DEVICE Address take(Address base) {
    const int slot = ring.slot;
    wait(base + C::RING_FULL + 8 * slot, ring.parity);
    ring.advance(p.slots);
    return base + C::CHUNKS + (p.resident * C::TERMS + slot) * CHUNK;
  }
  // Gives back `count` slots of the ring, before the last `newer` taken.
  SRPKD_DEVICE void release(int count, int newer, Address base) const {
    int slot = ring.slot - newer - count;
    if (slot < 0) slot += p.slots;
    for (int i = 0; i < count; ++i) {
      arrive_warp(base + C::RING_EMPTY + 8 * slot);
      if (++slot == p.slots) slot = 0;
    }
  }
  // How many slots a group of a tile takes: the columns, and the rows unless they are resident.
  SRPKD_DEVICE int slots_of(int at) const { return C::TERMS * (at < p.resident ? 1 : 2); }

  // sum += the Gram matrix of this warpgroup's rows and all columns over 64 channels.
  SRPKD_DEVICE void multiply_chunks(float (&sum)[64], Address rows, Address columns, bool accumulate) const {
    rows += half * PANEL;
#pragma unroll
    for (int k = 0; k < GROUP / 16; ++k) {
      const auto operand = [&](Address chunk) { return C::PIXELS_ADJACENT ? mn_major(chunk, k) : k_major(chunk, k); };
      multiply_add_async<Element, FEATURES, FEATURES>(sum, operand(rows), operand(columns), accumulate || k > 0);
    }
  }

  // sum += the products of the groups [first, end), for each of all terms except the smallest. A loop for groups whose
  // rows are resident, and one for those that come through the ring: the instructions between the products, not the
  // products, limit the loop.
  template <bool RESIDENT>
  SRPKD_DEVICE void multiply_groups(float (&sum)[64], int first, int end, bool accumulate, Address base) {
#pragma unroll 1
    for (int at = first; at < end; ++at, accumulate = true) {
      Address rows[C::TERMS], columns[C::TERMS];
#pragma unroll
      for (int term = 0; term < C::TERMS; ++term) {
        rows[term] = RESIDENT ? base + C::CHUNKS + (at * C::TERMS + term) * CHUNK : take(base);
        columns[term] = take(base);
      }
      fence_registers();
      multiply_chunks(sum, rows[0], columns[0], accumulate);
#pragma unroll
      for (int term = 1; term < C::TERMS; ++term) {
        multiply_chunks(sum, rows[term], columns[0], true);
        multiply_chunks(sum, rows[0], columns[term], true);
      }
      commit_products();
      constexpr int OWN = C::TERMS * (RESIDENT ? 1 : 2);
      if constexpr (!C::OVERLAP) {
        wait_for_products<0>();
        release(OWN, 0, base);
      } else if (at > 0) {
        wait_for_products<1>();
        release(RESIDENT ? OWN : slots_of(at - 1), OWN, base);
      }
    }
  }

  // G_s and G_t of this warpgroup's rows.
  SRPKD_DEVICE void gram(float (&s)[64], float (&t)[64], bool new_rows, int stage, Address base) {
    const int teacher = p.teacher_groups, resident = p.resident;
    if (new_rows) {
      const int parity = this->published(Published::parity);
#pragma unroll 1
      for (int at = 0; at < resident; ++at) wait(base + C::ROWS_FULL + 8 * at, parity);
      wait(base + C::ROWS_FULL + 8 * MAX_CHUNKS, parity);
    }
    multiply_groups<true>(t, 0, minimum(resident, teacher), false, base);
    multiply_groups<false>(t, minimum(resident, teacher), teacher, resident > 0, base);
    multiply_groups<true>(s, teacher, resident, true, base);
    multiply_groups<false>(s, resident > teacher ? resident : teacher, others, true, base);
    wait(base + C::COLUMNS_FULL + 8 * stage, tile / C::STAGES & 1);
    const Address columns = base + C::COLUMNS + stage * C::TERMS * CHUNK;
    fence_registers();
#pragma unroll
    for (int term = 0; term < C::TERMS; ++term) {
      multiply_chunks(s, base + C::ROWS + term * CHUNK, columns, true);
      if (term > 0) multiply_chunks(s, base + C::ROWS, columns + term * CHUNK, true);
    }
    commit_products();
  }

  static SRPKD_DEVICE typename C::Scale load_scale(const typename C::Scale* from) {
    const float alpha = load_global_coherent(&from->alpha), ratio = load_global_coherent(&from->ratio);
    if constexpr (C::UNITS_OF_COLUMNS)
      return {alpha, ratio, load_global_coherent(&from->unit), load_global_coherent(&from->ratio_of_units)};
    else
      return {alpha, ratio};
  }

  // Stores 64 columns of K for the warpgroup of the columns.
  SRPKD_DEVICE void store_weights(const Weights<C>& K, int columns_half, Address base) const {
    const int lane = this->lane();
    const uint32_t line = (64 * half + 16 * warp() + lane % 16) * LINE;
#pragma unroll
    for (int term = 0; term < C::TERMS; ++term)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        store_matrices<false>(base + C::K + (2 * term + columns_half) * CHUNK + swizzle(line + 32 * k + lane / 16 * 16),
                              K[term][4 * columns_half + k]);
  }

  // sum += K q_J, or sum = K q_J.
  SRPKD_DEVICE void multiply_weights(float (&sum)[32], const Weights<C>& K, Address columns, bool accumulate) const {
#pragma unroll
    for (int term = 0; term < C::TERMS; ++term)
#pragma unroll
      for (int other = 0; other + term < C::TERMS; ++other)
#pragma unroll
        for (int k = 0; k < TILE / 16; ++k) {
          const Address chunk = columns + other * CHUNK;
          const uint64_t features = pixels_of<C>(chunk, k);
          multiply_add_async<Element, OF_U>(sum, K[term][k], features, accumulate || term + other + k > 0);
        }
  }

  SRPKD_DEVICE void add_to_h(int64_t pixel, float sum, float scale) const {
    add_global(p.h + pixel, round_to_integer(sum * scale));
  }

  // Stores U of this warpgroup's rows. Neighbouring rows exchange channels, so that a lane has four adjacent floats.
  SRPKD_DEVICE void store_rows_of_U(float* U, const float (&sum)[32]) const {
    const int lane = this->lane(), g = lane / 4, t = lane % 4, odd = g % 2;
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        FourFloats out;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float even_channel = sum[(2 * q + i) * 4 + 2 * lower],
                      odd_channel = sum[(2 * q + i) * 4 + 2 * lower + 1];
          const float own = odd ? odd_channel : even_channel;
          const float other = shuffle_xor(odd ? even_channel : odd_channel, 4);
          out.value[2 * i] = odd ? other : own, out.value[2 * i + 1] = odd ? own : other;
        }
        const int pixel = 64 * half + 16 * warp() + 8 * lower + g - odd, channel = 16 * q + 2 * t + odd;
        store_global(reinterpret_cast<FourFloats*>(U + position_in_U(channel, pixel)), out);
      }
  }

  // Whether U of a tile is waited for when the next turn has come. That needs two buffers for the columns.
  static constexpr bool LAZY = C::GRAD && C::STAGES == 2;

  // Waits for the products of U, if there is a tile before, and gives back its columns.
  SRPKD_DEVICE void finish_U(float (&U)[32], bool any) const {
    wait_for_products<0>();
    hold(U);
    if (any) arrive_warp(shared + C::COLUMNS_EMPTY + 8 * ((tile - 1) % C::STAGES));
  }

  SRPKD_DEVICE void run() {
#pragma unroll 1
    for (int parity = 0;;) {
      wait(shared + C::SEGMENT_FULL, parity);
      const int image = this->published(Published::image);
      if (image < 0) break;
      const auto* const own =
          static_cast<const typename C::Scale*>(p.scales) + pixel_of(image, this->published(Published::row)) + row();
      const Rows<C> rows{{load_scale(own), load_scale(own + 8)}};
      const float unit = C::L1 || !C::SCALED ? 1 : 1 / power_of(image);
      float U[32] = {};
      RowSums sums;
      bool new_rows = true;
#pragma unroll 1
      for (int step = this->published(Published::first); step < this->published(Published::end);
           ++step, ++tile, new_rows = false) {
        const Address base = uniform(opaque(shared));
        const int stage = tile % C::STAGES;
        const bool diagonal = step == 0;
        float s[64] = {}, t[64];
        if constexpr (C::TWO_TERMS) {  // without values t would be live before its products, too, and more would spill
#pragma unroll
          for (int i = 0; i < 64; ++i) t[i] = 0;
        }
        if (p.turns) wait(base + C::TURN + 8 * half, (tile & 1) ^ (half == 0));
        if constexpr (LAZY) finish_U(U, !new_rows);
        gram(s, t, new_rows, stage, base);
        if (p.turns) arrive_warp(base + C::TURN + 8 * (half ^ 1));
        wait_for_products<0>();
        if (C::OVERLAP) release(slots_of(others - 1), 0, base);
        hold(s), hold(t);

        if constexpr (C::SYMMETRIC) {
          if (diagonal && p.zero_diagonal) zero_diagonal(s, row(), lane()), zero_diagonal(t, row(), lane());
        }
        Weights<C> K;
        float h_of_columns[2][2];
        const Address scales = base + C::SCALES + stage * TILE * int{sizeof(typename C::Scale)};
        const Epilogue<C> epilogue{p, rows, unit, lane()};
        epilogue.template half<0>(s, t, scales, sums, h_of_columns[0], K);
        epilogue.template half<1>(s, t, scales, sums, h_of_columns[1], K);
        if (diagonal) sums.template count_once<C>();
        if constexpr (!C::GRAD) {
          sync_warp();
          arrive_warp(base + C::COLUMNS_EMPTY + 8 * stage);
        } else {
          wait(base + C::K_EMPTY, (tile & 1) ^ 1);  // in every tile, since phases are told apart by their parity only
          if (!diagonal) {
            store_weights(K, 0, base), store_weights(K, 1, base);
            fence_async_proxy();
          }
          sync_warp();
          arrive_warp(base + C::K_FULL);

          for (int term = 0; term < C::TERMS; ++term) hold(K[term]);
          // Tensor cores round sums towards zero, which adds up over the thousands of pixels of a segment. With two
          // terms it would be the largest error, so each tile's sum is rounded to nearest when it is added to U.
          float of_tile[32];
          float (&sum)[32] = C::TWO_TERMS ? of_tile : U;
          if constexpr (!C::TWO_TERMS) hold(sum);
          fence_registers();
          multiply_weights(sum, K, base + C::COLUMNS + stage * C::TERMS * CHUNK, !C::TWO_TERMS);
          commit_products();
          if (!diagonal) add_h_of_columns(h_of_columns, step);
          if constexpr (!LAZY) {
            wait_for_products<0>();
            hold(sum);
            if constexpr (C::TWO_TERMS) {
#pragma unroll
              for (int i = 0; i < 32; ++i) U[i] += of_tile[i];
            }
            arrive_warp(base + C::COLUMNS_EMPTY + 8 * stage);
          }
        }
      }
      if constexpr (LAZY) finish_U(U, true);
      parity = 1 ^ this->published(Published::parity);
      finish_segment(U, sums, rows);
    }
  }

  SRPKD_DEVICE float h_factor() const { return as_float(this->published(Published::h_factor)); }
  SRPKD_DEVICE float power_of(int image) const { return load_global_coherent(p.powers + image); }

  SRPKD_DEVICE int64_t pixel_of(int image, int block) const { return (int64_t{image} * p.work.blocks + block) * TILE; }

  // The other groups of channels have the same loss and h as the first.
  SRPKD_DEVICE bool with_sums() const { return this->published(Published::split) == 0; }

  SRPKD_DEVICE void add_h_of_columns(const float (&h)[2][2], int step) const {
    if (!p.h || !with_sums()) return;
    const int image = this->published(Published::image);
    const int64_t pixel = pixel_of(image, column_of(p.work.blocks, this->published(Published::row), step)) + 2 * lane();
    const float factor = h_factor();
#pragma unroll
    for (int i = 0; i < 4; ++i) add_to_h(pixel + i / 2 * 64 + i % 2, h[i / 2][i % 2], factor);
  }

  SRPKD_DEVICE void finish_segment(float (&U)[32], RowSums& sums, const Rows<C>& rows) const {
    const int image = this->published(Published::image), row_block = this->published(Published::row);
    const int part = this->published(Published::part), split = this->published(Published::split);
    const float factor = h_factor();
    sync_warp();
    arrive_warp(shared + C::ROWS_EMPTY);
    if constexpr (C::GRAD) {
      const int64_t image_of_work = int64_t{part} * p.work.images + image * p.channel_splits + split;
      store_rows_of_U(p.U_rows + (image_of_work * p.work.blocks + row_block) * U_BLOCK, U);
    }
    if (split > 0) return;
    using Unit = std::conditional_t<C::SCALED, double, float>;  // with units, it may be out of the range of float
    store_sums(sums.template total_loss<C>(rows) * (C::L1 ? unit_of_sums<Unit>(C::SYMMETRIC, power_of(image)) : 1),
               sums.h, image, row_block, part, factor);
  }

  SRPKD_DEVICE void store_sums(double loss, float (&h)[2], int image, int row_block, int part, float h_scale) const {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) loss += shuffle_xor(loss, lanes);
    if (lane() == 0) {
      const int64_t at = (int64_t{image} * p.work.blocks + row_block) * p.work.parts + part;
      store_global(p.loss + at * LOSS_TERMS + 4 * half + warp(), loss * p.loss_factor);
    }
    if constexpr (C::GRAD) {
      if (!p.h) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        h[i] += shuffle_xor(h[i], 1);
        h[i] += shuffle_xor(h[i], 2);
        if (lane() % 4 == 0)
          add_to_h((int64_t{image} * p.work.blocks + row_block) * TILE + row() + 8 * i, h[i], h_scale);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------

template <class C>
SRPKD_DEVICE void initialize_barriers(Address shared) {
  constexpr int WARPS = 4 * CONSUMERS;
  for (int i = 0; i <= MAX_CHUNKS; ++i) initialize_barrier(shared + C::ROWS_FULL + 8 * i, 1);
  initialize_barrier(shared + C::SEGMENT_FULL, 1);
  initialize_barrier(shared + C::ROWS_EMPTY, WARPS + 5 * C::GRAD);  // with those of Columns and the adder
  for (int i = 0; i < C::STAGES; ++i) {
    initialize_barrier(shared + C::COLUMNS_FULL + 8 * i, 1);
    initialize_barrier(shared + C::COLUMNS_EMPTY + 8 * i, WARPS);
  }
  for (int i = 0; i < MAX_CHUNKS; ++i) {
    initialize_barrier(shared + C::RING_FULL + 8 * i, 1);
    initialize_barrier(shared + C::RING_EMPTY + 8 * i, WARPS);
  }
  for (int i = 0; i < CONSUMERS; ++i) initialize_barrier(shared + C::TURN + 8 * i, 4);
  initialize_barrier(shared + C::K_FULL, WARPS);
  initialize_barrier(shared + C::K_EMPTY, 4);
  initialize_barrier(shared + C::STAGING_FULL, 4);
  initialize_barrier(shared + C::STAGING_EMPTY, 1);
  fence_barrier_initialization();
  fence_async_proxy();
}

template <class C>
SRPKD_DEVICE void relation_tiles_of_block(const Params& p) {
  Preparation<C>{p}.run();
  const int thread = thread_index(), warpgroup = uniform(thread / 128);
  if (thread == 0) initialize_barriers<C>(shared_memory());
  sync_block();
  if (warpgroup == 0) {
    decrease_registers<C::PRODUCER_REGISTERS>();
    if (thread == 0)
      ColumnLoader<C>(p).run();
    else if (thread == 32)
      RowLoader<C>(p).run();
    else if (C::GRAD && thread / 32 == 2)
      Adder<C>(p).run();
  } else if (warpgroup <= CONSUMERS) {
    increase_registers<C::CONSUMER_REGISTERS>();
    Consumer<C>(p, warpgroup - 1).run();
  } else if constexpr (C::GRAD) {
    decrease_registers<C::COLUMN_REGISTERS>();
    Columns<C>(p).run();
  }
}

#if defined(__CUDACC__)
template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) relation_tiles([[maybe_unused]] const __grid_constant__ Params p) {
#if SRPKD_DEVICE_SM90A
  relation_tiles_of_block<C>(p);
#endif
}
#endif

}  // namespace srpkd::cuda::sm90
