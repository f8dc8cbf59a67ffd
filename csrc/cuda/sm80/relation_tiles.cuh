// The loss, U and h (TileSums in kernels/formulas.py) on an NVIDIA GPU, sm_80 and newer. Free of torch.
//
// A thread block computes the rows of 64 pixels i and loops over the pixels j in blocks of 64. For each pair of blocks:
//
//   G_s, G_t    Tensor cores multiply the raw features, in panels of 128 bytes of channels. Asynchronous copies bring
//               the panels of j into a ring of slots in shared memory; the panels of i stay resident there.
//   D, P, K     computed on the accumulators, in registers: scaling, rho, rho'. K overwrites G_s.
//   U += K q_j  Tensor cores again. The accumulator of one product is the left operand of the next, so K never leaves
//               its registers, and q_j is still in the ring.
//
// K enters that product as tf32, never in 16 bits: 16-bit features convert to tf32 without error, and K keeps eleven
// bits where bfloat16 has eight, and exponents beyond the range of float16. For float16 features, K has two tf32 terms,
// because one term has only as many bits as a float16 gradient. There are no atomics: results are bit-identical from
// run to run.
#pragma once

#include "../overlap.cuh"
#include "epilogue.cuh"
#include "fragments.cuh"

namespace srpkd::cuda::sm80 {

SRPKD_DEVICE int clamped(int value, int limit) { return value < 0 ? 0 : minimum(value, limit); }

// The work of one thread block.
template <class C>
struct RelationTiles {
  using Element = typename C::Element;
  using UPanel = float[C::M_TILES][C::PANEL_CHANNELS / 8][4];

  const Params& p;
  const Warp<C> warp;
  const Address shared = shared_memory();

  // The part of the work that this thread block does.
  const int index = block_index(0), split = block_index(1), row_block = index % p.blocks;
  const int channel_split = index / p.blocks % p.channel_splits, image = index / p.blocks / p.channel_splits;
  // Panels are numbered, the teacher's first. A step processes them in a rotated order that ends with the panels of U,
  // which are then in the ring when K is ready. The teacher's panels are rotated equally, so that equal features give
  // bit-identical sums.
  const int teacher_panels = p.panels[TEACHER], student_panels = p.panels[STUDENT],
            panels = teacher_panels + student_panels;
  const int u_first = channel_split * C::U_PANELS, u_panels = minimum(student_panels - u_first, C::U_PANELS);
  const int student_rotation = C::GRAD ? (u_first + u_panels) % student_panels : 0;
  const int teacher_rotation = student_rotation % teacher_panels;
  const Walk walk = walk_of(row_block, p.blocks, C::GRAD, split, p.splits);
  // The next column panel to copy.
  int copy_item = 0, copy_block = walk.first;

  SRPKD_DEVICE explicit RelationTiles(const Params& params) : p(params) {}

  // --- global to shared memory ---------------------------------------------------------------------------------------

  SRPKD_DEVICE Address slot_at(int slot) const {
    return shared + p.resident * PANEL + slot * slot_bytes(p.resident < panels);
  }

  static SRPKD_DEVICE int advanced(int slot, int by) { return slot + by < C::SLOTS ? slot + by : slot + by - C::SLOTS; }

  // Returns the address of a row panel while the column panel in `slot` is processed.
  SRPKD_DEVICE Address rows_at(int panel, Address slot) const {
    return panel < p.resident ? shared + panel * PANEL : slot + PANEL + SCALES;
  }

  SRPKD_DEVICE int panel_of(int item) const {
    const bool teacher = item < teacher_panels;
    const int rotated = item + (teacher ? teacher_rotation : student_rotation), end = teacher ? teacher_panels : panels;
    return rotated < end ? rotated : rotated - (teacher ? teacher_panels : student_panels);
  }

  // Copies the channels of one panel of TILE pixels, `ALIGNED` bytes at a time, with zeros beyond the last pixel or
  // channel.
  template <int ALIGNED>
  SRPKD_DEVICE void copy_lines(const Features& from, int pixel, int channel, Address to) const {
    constexpr int UNITS = PANEL / 16 / C::PANEL_LINES, LINES = C::THREADS / UNITS;  // per line; per iteration
    // Read again, so that values derived from it do not occupy registers between copies.
    const int thread = thread_index();
    const int first = thread / UNITS, byte = thread % UNITS * 16;
    const int line = C::PIXELS_ADJACENT ? channel : pixel;
    const int adjacent = (C::PIXELS_ADJACENT ? pixel : channel) + byte / C::SIZE;
    const int lines = (C::PIXELS_ADJACENT ? from.channels : p.pixels) - line;
    const int valid = C::SIZE * clamped((C::PIXELS_ADJACENT ? p.pixels : from.channels) - adjacent, 16 / C::SIZE);
    const char* source = static_cast<const char*>(from.data) +
                         (image * from.image_stride + (line + first) * from.line_stride + adjacent) * C::SIZE;
    const int64_t stride = LINES * C::SIZE * from.line_stride;
#pragma unroll(ALIGNED == 16 ? C::PANEL_LINES / LINES : 1)
    for (int i = first; i < C::PANEL_LINES; i += LINES, source += stride) {
      const int left = i < lines ? valid : 0;
      const Address unit = to + swizzled<C>(i, byte);
      if constexpr (ALIGNED == 2) {  // too narrow for an asynchronous copy
        const auto* elements = reinterpret_cast<const uint16_t*>(source);
        Words words;
#pragma unroll
        for (int at = 0; at < 4; ++at)
          words.word[at] = (4 * at < left ? load_input(elements + 2 * at) : 0u) |
                           (4 * at + 2 < left ? load_input(elements + 2 * at + 1) : 0u) << 16;
        store_shared(unit, words);
      } else {
#pragma unroll
        for (int at = 0; at < 16; at += ALIGNED)
          copy_async<ALIGNED>(unit + at, source + at, clamped(left - at, ALIGNED));
      }
    }
  }

  SRPKD_DEVICE void copy_panel(int panel, int pixel, Address to) const {
    const bool student = panel >= teacher_panels;
    const Features& from = p.features[student];
    const int channel = (panel - student * teacher_panels) * C::PANEL_CHANNELS;
    if (from.copy_bytes == 16)
      copy_lines<16>(from, pixel, channel, to);
    else if (!C::NARROW || from.copy_bytes == 4)
      copy_lines<4>(from, pixel, channel, to);
    else
      copy_lines<C::NARROW ? 2 : 4>(from, pixel, channel, to);
  }

  // Copies alpha of one block of pixels, the student's first, with zeros beyond the last pixel.
  SRPKD_DEVICE void copy_scales(int pixel, Address to) const {
    for (int i = thread_index(); i < 2 * TILE; i += C::THREADS) {
      const float* alpha = p.features[i < TILE].alpha;
      const int at = pixel + i % TILE;
      if (alpha)
        copy_async<4>(to + 4 * i, alpha + int64_t{image} * p.pixels + at, at < p.pixels ? 4 : 0);
      else
        store_shared(to + 4 * i, 1.f);
    }
  }

  // Starts to copy the next column panel, with the row panel if `with_rows` or if that is not resident.
  SRPKD_DEVICE void copy_next(Address slot, bool with_rows) {
    const int panel = panel_of(copy_item), pixel = copy_block * TILE;
#pragma unroll 1
    for (int i = !with_rows && panel < p.resident; i < 2; ++i)
      copy_panel(panel, i ? pixel : row_block * TILE, i ? slot : rows_at(panel, slot));
    if (++copy_item == panels) {
      copy_scales(pixel, slot + PANEL);
      copy_item = 0;
      copy_block = copy_block + 1 < p.blocks ? copy_block + 1 : 0;
    }
  }

  // --- tensor core products ------------------------------------------------------------------------------------------

  // Adds the Gram matrix of this warp's rows and columns over the channels of one panel.
  static SRPKD_DEVICE void add_gram(Accumulator<C>& sum, Address rows, Address columns) {
#pragma unroll
    for (int k = 0; k < C::PANEL_CHANNELS; k += 32 / C::SIZE) {
      Fragment<C> a[C::M_TILES];
#pragma unroll
      for (int m = 0; m < C::M_TILES; ++m) Warp<C>::template load_features<true>(a[m], rows, 16 * m, k);
#pragma unroll
      for (int n = 0; n < C::N_TILES; n += 2) {
        Fragment<C> b;
        Warp<C>::template load_features<false>(b, columns, 8 * n, k);
#pragma unroll
        for (int m = 0; m < C::M_TILES; ++m)
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            float (&to)[4] = sum[m][n + o];
            if constexpr (C::FEATURE_TERMS == 1) {
              multiply_add<Element>(to, a[m][0], b[0][2 * o], b[0][2 * o + 1]);
            } else {  // small terms first; summed in float32, because tensor cores round sums towards zero
              float part[4] = {};
              multiply_add<Element>(part, a[m][1], b[0][2 * o], b[0][2 * o + 1]);
              multiply_add<Element>(part, a[m][0], b[1][2 * o], b[1][2 * o + 1]);
              multiply_add<Element>(part, a[m][0], b[0][2 * o], b[0][2 * o + 1]);
#pragma unroll
              for (int i = 0; i < 4; ++i) to[i] += part[i];
            }
          }
      }
    }
  }

  // Reorders an accumulator into the left operand of the next product.
  static SRPKD_DEVICE void to_left_operand(uint32_t (&a)[4], const float (&k)[4]) {
    a[0] = as_bits(k[0]), a[1] = as_bits(k[2]), a[2] = as_bits(k[1]), a[3] = as_bits(k[3]);
  }

  // Adds K q_j over this warp's columns to U, for the channels of one panel. The sum of each tile is computed
  // separately and added in float32: over thousands of tiles, the tensor cores' truncated sums would drift.
  static SRPKD_DEVICE void add_to_U(UPanel& U, const Accumulator<C>& K, const Accumulator<C>& K_rest,
                                    Address features) {
#pragma unroll
    for (int c = 0; c < C::PANEL_CHANNELS; c += 16) {
      float sum[C::M_TILES][2][4] = {}, small[C::M_TILES][2][4] = {};
#pragma unroll
      for (int n = 0; n < C::N_TILES; n += C::NARROW ? 2 : 1) {
        uint32_t raw[4];
        Warp<C>::template load<C::PIXELS_ADJACENT, false>(raw, features, c, 8 * n);
#pragma unroll
        for (int j = 0; j < (C::NARROW ? 2 : 1); ++j)
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            uint32_t q[2][2];  // [term][half of k]
            if constexpr (C::NARROW) {
              q[0][0] = widen<Element, false>(raw[j + 2 * o]);
              q[0][1] = widen<Element, true>(raw[j + 2 * o]);
            } else {
              split_feature<C>(raw[2 * o], q[0][0], q[1][0]);
              split_feature<C>(raw[2 * o + 1], q[0][1], q[1][1]);
            }
#pragma unroll
            for (int m = 0; m < C::M_TILES; ++m) {
              uint32_t a[4];
              to_left_operand(a, K[m][n + j]);
              if constexpr (C::K_TERMS == 2) {
                uint32_t rest[4];
                to_left_operand(rest, K_rest[m][n + j]);
                multiply_add<float>(small[m][o], rest, q[0][0], q[0][1]);
              }
              if constexpr (C::FEATURE_TERMS == 2) multiply_add<float>(small[m][o], a, q[1][0], q[1][1]);
              multiply_add<float>(sum[m][o], a, q[0][0], q[0][1]);
            }
          }
      }
      for_each<C::M_TILES, 2>([&](int m, int o, int i) { U[m][c / 8 + o][i] += sum[m][o][i] + small[m][o][i]; });
    }
  }

  // --- the loop over the tiles ---------------------------------------------------------------------------------------

  SRPKD_DEVICE void load_row_scales(const float* alpha, RowVector<C>& to) const {
#pragma unroll
    for (int m = 0; m < C::M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_block * TILE + warp.row(m, half);
        to[m][half] = !alpha ? 1.f : row < p.pixels ? load_global(alpha + int64_t{image} * p.pixels + row) : 0.f;
      }
  }

  // Zeros G_ii, so that D_ii is exactly 0; NaN stays NaN.
  SRPKD_DEVICE void zero_diagonal(Accumulator<C>& sum) const {
    for_each<C::M_TILES, C::N_TILES>([&](int m, int n, int i) {
      if (warp.row(m, i / 2) == warp.column(n, i % 2)) sum[m][n][i] *= 0;
    });
  }

  SRPKD_DEVICE void run() {
    RowVector<C> row_s, row_t, h{};
    load_row_scales(p.features[STUDENT].alpha, row_s);
    load_row_scales(p.features[TEACHER].alpha, row_t);
    double loss = 0;
    UPanel U[C::GRAD ? C::U_PANELS : 1] = {};
    Accumulator<C> s{}, t{};

    const int left = warp.template lane_offset<!C::PIXELS_ADJACENT, true>(warp.first_row, 0);
    const int right = warp.template lane_offset<!C::PIXELS_ADJACENT, false>(warp.first_column, 0);
    const int right_of_U = warp.template lane_offset<C::PIXELS_ADJACENT, false>(0, warp.first_column);
    // Every iteration starts a copy, and processes the panel whose copy was started PREFETCH iterations before.
    int remaining = walk.steps * panels + PREFETCH, item = -PREFETCH, slot = C::SLOTS - PREFETCH, block = walk.first;
    const int remaining_after_rows = remaining - panels;
#pragma unroll 1
    for (; remaining > 0; --remaining) {
      if (item >= 0) {
        wait_for_copies<PREFETCH - 1>();  // this thread's part of the panel has arrived
        sync_block();  // all parts have, and no thread still reads the slot that the next copy overwrites
      }
      if (remaining > PREFETCH) copy_next(slot_at(advanced(slot, PREFETCH)), remaining > remaining_after_rows);
      commit_copies();  // an empty group if there is nothing left to copy
      const int current = slot, panel = panel_of(item);
      slot = advanced(slot, 1);
      if (item++ < 0) continue;

      const Address columns = slot_at(current), rows = rows_at(panel, columns);
      if (item <= teacher_panels)
        add_gram(t, rows + left, columns + right);
      else
        add_gram(s, rows + left, columns + right);
      if (item < panels) continue;

      const bool diagonal = block == row_block;
      if (p.zero_diagonal && diagonal) zero_diagonal(s), zero_diagonal(t);
      epilogue(p, warp, s, t, row_s, row_t, columns + PANEL, !diagonal, loss, h);
      if constexpr (C::GRAD) {
#pragma unroll
        for (int u = 0; u < C::U_PANELS; ++u)
          if (u < u_panels) add_to_U(U[u], s, t, slot_at(advanced(slot, C::SLOTS - u_panels + u)) + right_of_U);
      }
      for_each<C::M_TILES, C::N_TILES>([&](int m, int n, int i) { s[m][n][i] = t[m][n][i] = 0; });
      item = 0;
      block = block + 1 < p.blocks ? block + 1 : 0;
    }
    sync_block();                        // the ring is free
    RelationTiles(p).store(U, h, loss);  // computes its members again, so that they do not occupy registers before
  }

  template <class F>
  static SRPKD_DEVICE void for_each_of_U(F f) {
#pragma unroll
    for (int u = 0; u < C::U_PANELS; ++u)
      for_each<C::M_TILES, C::PANEL_CHANNELS / 8>([&](int m, int n, int i) { f(u, m, n, i); });
  }

  // Sums the results of the warps with the same rows, in the order of their columns, and writes them to global memory.
  SRPKD_DEVICE void store(const UPanel (&U)[C::GRAD ? C::U_PANELS : 1], const RowVector<C>& h, double loss) const {
    constexpr int U_LINES = C::M_TILES * C::U_CHANNELS / 2;  // of one warp, 32 floats each
    const Address h_at = shared + (C::WARPS_N - 1) * C::WARPS_M * U_LINES * LINE,
                  loss_at = h_at + C::WARPS_N * TILE * 4;
    const auto line_of_U = [&](int warp_n, int u, int m, int n, int i) {
      const int line = ((u * C::M_TILES + m) * (C::PANEL_CHANNELS / 8) + n) * 4 + i;
      return shared + (((warp_n - 1) * C::WARPS_M + warp.warp_m) * U_LINES + line) * LINE + warp.lane * 4;
    };
    for (int lanes = 1; lanes < 32; lanes *= 2) loss += shuffle_xor(loss, lanes);
    if (warp.lane == 0) store_shared(loss_at + warp.thread / 32 * 8, loss);
    if constexpr (C::GRAD) {
#pragma unroll
      for (int m = 0; m < C::M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = h[m][half];
          sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);
          if (warp.member == 0) store_shared(h_at + (warp.warp_n * TILE + warp.row(m, half)) * 4, sum);
        }
      if (warp.warp_n > 0)
        for_each_of_U(
            [&](int u, int m, int n, int i) { store_shared(line_of_U(warp.warp_n, u, m, n, i), U[u][m][n][i]); });
    }
    sync_block();

    if (channel_split == 0 && warp.thread == 0) {
      double sum = 0;
      for (int i = 0; i < C::THREADS / 32; ++i) sum += load_shared<double>(loss_at + i * 8);
      store_global(p.loss + int64_t{image * p.splits + split} * p.blocks + row_block, sum);
    }
    if constexpr (C::GRAD) {
      const float factor = p.row ? 1.f : 2.f;  // P_ij == P_ji unless p.row
      const int row = row_block * TILE + warp.thread;
      if (channel_split == 0 && p.h && warp.thread < TILE && row < p.pixels) {
        float sum = 0;
        for (int n = 0; n < C::WARPS_N; ++n) sum += load_shared<float>(h_at + (n * TILE + warp.thread) * 4);
        store_global(p.h + int64_t{split * p.images + image} * p.pixels + row, factor * sum);
      }
      float* const own = p.U + split * p.U_strides[0] + image * p.U_strides[1];
      if (warp.warp_n == 0)
        for_each_of_U([&](int u, int m, int n, int i) {
          float sum = U[u][m][n][i];
          for (int other = 1; other < C::WARPS_N; ++other) sum += load_shared<float>(line_of_U(other, u, m, n, i));
          const int row = row_block * TILE + warp.row(m, i / 2);
          const int channel = (u_first + u) * C::PANEL_CHANNELS + 8 * n + 2 * warp.member + i % 2;
          if (row < p.pixels && channel < p.features[STUDENT].channels)
            store_global(own + row * p.U_strides[2] + channel * p.U_strides[3], factor * sum);
        });
    }
  }
};

#if defined(__CUDACC__)
template <class C>
__global__ void __launch_bounds__(C::THREADS, C::MIN_BLOCKS) relation_tiles(const __grid_constant__ Params p) {
  run_in_order<RelationTiles<C>>(p);
}
#endif

}  // namespace srpkd::cuda::sm80
