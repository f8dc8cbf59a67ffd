// The loss, U and h (kernels/algebra.py, Tiles) on an NVIDIA GPU, sm_80 and newer. Free of torch.
//
// A block of threads owns 64 pixels i and walks over the pixels j in blocks of 64. For each pair of blocks:
//
//   G_s, G_t    by the tensor cores from the raw features, in panels of 128 bytes of channels. The panels of j come
//               through a ring of slots in shared memory by asynchronous copies; those of i stay there.
//   D, P, K     on the accumulators, in registers: scaling, rho, rho'. K takes the place of G_s.
//   U += K q_j  by the tensor cores again. The accumulator of one product is the left operand of the next, so K never
//               leaves its registers, and q_j is still in the ring.
//
// K enters that product as tf32, never as 16 bits: 16-bit features become tf32 without error, and K keeps eleven bits
// where bfloat16 has eight, and the exponents that float16 has not. float16 takes K in two terms, as its gradients are
// rounded as finely as one. There are no atomics: the same bits from run to run.
#pragma once

#include <cfloat>
#include <cmath>

#include "config.h"
#if defined(__CUDACC__)
#include "primitives.cuh"
#else
#include "emulation.h"  // tests/cuda_emulation
#endif

namespace srpkd::cuda {

struct alignas(16) Words {
  uint32_t word[4];
};

SRPKD_DEVICE int within(int value, int limit) { return value < 0 ? 0 : minimum(value, limit); }

template <Distance DISTANCE>
SRPKD_DEVICE float penalty(float d, float delta) {
  const float size = fabsf(d);
  if constexpr (DISTANCE == Distance::l1) return size;
  if constexpr (DISTANCE == Distance::l2) return d * d;
  return size <= delta ? 0.5f * d * d : delta * (size - 0.5f * delta);
}

template <Distance DISTANCE>
SRPKD_DEVICE float penalty_slope(float d, float delta) {
  if constexpr (DISTANCE == Distance::l1) return (d > 0 ? 1.f : 0.f) - (d < 0 ? 1.f : 0.f);
  if constexpr (DISTANCE == Distance::l2) return d + d;
  return d > delta ? delta : d < -delta ? -delta : d;  // NaN stays NaN
}

// f(m, n, i) for the elements that a thread has of M x N accumulators of 16 x 8.
template <int M, int N, class F>
SRPKD_DEVICE void for_each(F f) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(m, n, i);
}

// One block of threads at work.
template <class C>
struct RelationTiles {
  using Element = typename C::Element;
  using Accumulator = float[C::M_TILES][C::N_TILES][4];
  using Fragment = uint32_t[C::FEATURE_TERMS][4];  // 16 pixels (or channels) by 32 bytes
  using Scale = float[C::M_TILES][2];              // of the rows lane / 4 and lane / 4 + 8
  using PanelOfU = float[C::M_TILES][C::PANEL_CHANNELS / 8][4];

  const Params& p;
  const int thread = thread_index(), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_m = thread / 32 / C::WARPS_N, warp_n = thread / 32 % C::WARPS_N;
  const int first_row = warp_m * 16 * C::M_TILES, first_column = warp_n * 8 * C::N_TILES;
  const Address shared = shared_memory();

  // This block's part of the work.
  const int index = block_index(0), split = block_index(1), row_block = index % p.blocks;
  const int channel_split = index / p.blocks % p.channel_splits, image = index / p.blocks / p.channel_splits;
  // Panels are numbered, the teacher's first. A step meets them in an order that ends with those of U, which are then
  // in the ring when K is ready; the teacher's are turned by as much, so that equal features give equal sums.
  const int teacher_panels = p.panels[0], student_panels = p.panels[1], panels = teacher_panels + student_panels;
  const int u_first = channel_split * C::U_PANELS, u_panels = minimum(student_panels - u_first, C::U_PANELS);
  const int student_turn = C::GRAD ? (u_first + u_panels) % student_panels : 0;
  const int teacher_turn = student_turn % teacher_panels;
  const Walk walk = walk_of(row_block, p.blocks, C::GRAD, split, p.splits);
  // The next panel of j to copy.
  int copy_item = 0, copy_block = walk.first;

  SRPKD_DEVICE explicit RelationTiles(const Params& params) : p(params) {}

  // --- global to shared memory ---------------------------------------------------------------------------------------

  // Where byte `byte` of line `line` of a panel lies. The 16-byte pieces of a line change places, differently in each
  // of eight lines: pieces one above the other, which ldmatrix reads together, then lie in different banks.
  static SRPKD_DEVICE int place(int line, int byte) {
    return byte / LINE * (C::PANEL_LINES * LINE) + line * LINE + (byte % LINE ^ (line % 8 * 16));
  }

  SRPKD_DEVICE Address slot_at(int slot) const {
    return shared + p.resident * PANEL + slot * slot_bytes(p.resident < panels);
  }

  static SRPKD_DEVICE int advanced(int slot, int by) { return slot + by < C::SLOTS ? slot + by : slot + by - C::SLOTS; }

  // Where a panel of i is while the panel of j in `slot` is worked on.
  SRPKD_DEVICE Address rows_at(int panel, Address slot) const {
    return panel < p.resident ? shared + panel * PANEL : slot + PANEL + SCALES;
  }

  SRPKD_DEVICE int panel_of(int item) const {
    const bool teacher = item < teacher_panels;
    const int turned = item + (teacher ? teacher_turn : student_turn), end = teacher ? teacher_panels : panels;
    return turned < end ? turned : turned - (teacher ? teacher_panels : student_panels);
  }

  // 64 pixels of a panel's channels, zeros where there are no more; `ALIGNED` bytes at a time.
  template <int ALIGNED>
  SRPKD_DEVICE void copy_lines(const Features& from, int pixel, int channel, Address to) const {
    constexpr int PIECES = PANEL / 16 / C::PANEL_LINES, LINES = C::THREADS / PIECES;  // of a line; at a time
    const int thread = thread_index();  // again: what follows from it is then not kept in registers between copies
    const int first = thread / PIECES, byte = thread % PIECES * 16;
    const int line = C::PIXELS_ADJACENT ? channel : pixel;
    const int adjacent = (C::PIXELS_ADJACENT ? pixel : channel) + byte / C::SIZE;
    const int lines = (C::PIXELS_ADJACENT ? from.channels : p.pixels) - line;
    const int valid = C::SIZE * within((C::PIXELS_ADJACENT ? p.pixels : from.channels) - adjacent, 16 / C::SIZE);
    const char* source = static_cast<const char*>(from.data) +
                         (image * from.image_stride + (line + first) * from.line_stride + adjacent) * C::SIZE;
    const int64_t stride = LINES * C::SIZE * from.line_stride;
#pragma unroll(ALIGNED == 16 ? C::PANEL_LINES / LINES : 1)
    for (int i = first; i < C::PANEL_LINES; i += LINES, source += stride) {
      const int left = i < lines ? valid : 0;
      const Address piece = to + place(i, byte);
      if constexpr (ALIGNED == 2) {  // too narrow for an asynchronous copy
        const auto* elements = reinterpret_cast<const uint16_t*>(source);
        Words words;
#pragma unroll
        for (int at = 0; at < 4; ++at)
          words.word[at] = (4 * at < left ? load_global(elements + 2 * at) : 0u) |
                           (4 * at + 2 < left ? load_global(elements + 2 * at + 1) : 0u) << 16;
        store_shared(piece, words);
      } else {
#pragma unroll
        for (int at = 0; at < 16; at += ALIGNED)
          copy_async<ALIGNED>(piece + at, source + at, within(left - at, ALIGNED));
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

  // alpha of one block of pixels, the student's first, 0 beyond the last.
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

  // Starts to copy the next panel of j, and the same of i if it `brings_rows`.
  SRPKD_DEVICE void copy_next(Address slot, bool brings_rows) {
    const int panel = panel_of(copy_item), pixel = copy_block * TILE;
#pragma unroll 1
    for (int i = !brings_rows && panel < p.resident; i < 2; ++i)
      copy_panel(panel, i ? pixel : row_block * TILE, i ? slot : rows_at(panel, slot));
    if (++copy_item == panels) {
      copy_scales(pixel, slot + PANEL);
      copy_item = 0;
      copy_block = copy_block + 1 < p.blocks ? copy_block + 1 : 0;
    }
  }

  // --- shared memory to registers ------------------------------------------------------------------------------------

  // The operand of a product that has 16 pixels or channels from `outer` on, and 32 bytes of k. r[i] holds eight of the
  // outer dimension and half of k, in the order that the LEFT operand wants, or the two right operands side by side.
  //
  // Floats are not transposed by ldmatrix. Where their k is not adjacent they are read one by one, and k = t, t + 4 of
  // the product are lines 2t, 2t + 1: four lines whose pieces of 32 bytes are in different banks, and the order in
  // which the accumulator of K has its columns. Where pixels are adjacent, so that those lines are channels and K's
  // product gets its pixels from ldmatrix in their own order, the columns of G change places instead: see column().
  //
  // place_of_lane() is what differs from lane to lane; panels are aligned to lines, so the rest can be added to it, or
  // exchanged as in place(), when the panel's address is known: in immediate operands rather than in registers.
  template <bool K_ADJACENT, bool LEFT>
  SRPKD_DEVICE int place_of_lane(int outer, int k) const {
    if constexpr (K_ADJACENT || C::NARROW) {
      const int matrix = lane / 8, line = lane % 8;
      const int o = LEFT ? matrix % 2 : matrix / 2, half = LEFT ? matrix / 2 : matrix % 2;
      return K_ADJACENT ? place(outer + 8 * o + line, k * C::SIZE + 16 * half)
                        : place(k + 8 * half + line, (outer + 8 * o) * C::SIZE);
    } else {
      return place(k + 2 * member,
                   (outer + (!LEFT && C::PIXELS_ADJACENT ? group / 2 + group % 2 * 4 : group)) * C::SIZE);
    }
  }

  static SRPKD_DEVICE Address moved(Address from, int lines, int bytes) {
    return (from ^ bytes % LINE) + lines * LINE + bytes / LINE * (C::PANEL_LINES * LINE);
  }

  template <bool K_ADJACENT, bool LEFT>
  static SRPKD_DEVICE void load(uint32_t (&r)[4], Address from, int outer, int k) {
    if constexpr (K_ADJACENT) {
      load_matrices<false>(r, moved(from, outer, k * C::SIZE));
    } else if constexpr (C::NARROW) {
      load_matrices<true>(r, moved(from, k, outer * C::SIZE));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = LEFT ? i % 2 : i / 2, half = LEFT ? i / 2 : i % 2;
        r[i] = load_shared<uint32_t>(moved(from, k + half, (outer + 8 * o) * C::SIZE) ^ 16 * half);
      }
    }
  }

  // The row of a tile that an accumulator has in its elements 0, 1 (half = 0) and 2, 3 (half = 1), and the column that
  // it has in 0, 2 (odd = 0) and 1, 3 (odd = 1).
  SRPKD_DEVICE int row_in_tile(int m, int half) const { return first_row + 16 * m + 8 * half + group; }
  SRPKD_DEVICE int column(int n, int odd) const {
    const bool turned = C::PIXELS_ADJACENT && !C::NARROW;
    return first_column + 8 * n + (turned ? member + 4 * odd : 2 * member + odd);
  }

  // The tensor cores ignore the last 13 bits of a tf32: half of the last bit that counts, added, rounds to nearest.
  static SRPKD_DEVICE uint32_t nearest_tf32(float value) { return as_bits(value) + 0x1000; }

  // value = first + second, two tf32; NaN and infinity, which the first may lose, are NaN in the second.
  static SRPKD_DEVICE void split_float(float value, uint32_t& first, uint32_t& second) {
    first = nearest_tf32(value) & ~0x1fffu;
    second = as_bits(value - as_float(first));
  }

  static SRPKD_DEVICE void split_feature(uint32_t bits, uint32_t& first, uint32_t& second) {
    const float value = as_float(bits);
    if constexpr (C::FEATURE_TERMS == 2)
      split_float(value, first, second);
    else
      first = fabsf(value) <= FLT_MAX ? nearest_tf32(value) : bits;  // NaN stays NaN
  }

  template <bool LEFT>
  static SRPKD_DEVICE void load_features(Fragment& to, Address from, int outer, int k) {
    load<!C::PIXELS_ADJACENT, LEFT>(to[0], from, outer, k);
    if constexpr (!C::NARROW)
#pragma unroll
      for (int i = 0; i < 4; ++i) split_feature(to[0][i], to[0][i], to[C::FEATURE_TERMS - 1][i]);
  }

  // --- the products and what lies between them -----------------------------------------------------------------------

  // sum += the Gram matrix of this warp's rows and columns over the channels of one panel.
  static SRPKD_DEVICE void add_gram(Accumulator& sum, Address rows, Address columns) {
#pragma unroll
    for (int k = 0; k < C::PANEL_CHANNELS; k += 32 / C::SIZE) {
      Fragment a[C::M_TILES];
#pragma unroll
      for (int m = 0; m < C::M_TILES; ++m) load_features<true>(a[m], rows, 16 * m, k);
#pragma unroll
      for (int n = 0; n < C::N_TILES; n += 2) {
        Fragment b;
        load_features<false>(b, columns, 8 * n, k);
#pragma unroll
        for (int m = 0; m < C::M_TILES; ++m)
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            float (&to)[4] = sum[m][n + o];
            if constexpr (C::FEATURE_TERMS == 1) {
              multiply_add<Element>(to, a[m][0], b[0][2 * o], b[0][2 * o + 1]);
            } else {  // the small ones first; added up in float32, for the tensor cores round sums towards zero
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

  // From G_s and G_t this thread's share of the loss and of h, and K in the place of G_s.
  template <bool ROW, Distance DISTANCE>
  SRPKD_DEVICE void epilogue(Accumulator& s, Accumulator& t, const Scale& row_s, const Scale& row_t, Address scales,
                             bool mirrored, double& loss, Scale& h) const {
    float tile_loss = 0;
    Scale tile_h{};
#pragma unroll
    for (int n = 0; n < C::N_TILES; ++n) {
      float column_s[2], column_t[2];
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        column_s[odd] = load_shared<float>(scales + 4 * column(n, odd));
        column_t[odd] = load_shared<float>(scales + 4 * (column(n, odd) + TILE));
      }
#pragma unroll
      for (int m = 0; m < C::M_TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float alpha_s = row_s[m][i / 2], alpha_t = row_t[m][i / 2], beta_s = column_s[i % 2],
                      beta_t = column_t[i % 2];
          const float g = s[m][n][i];
          const float scale = ROW ? alpha_s : product(alpha_s, beta_s);
          const float a = product(g, scale), d = a - product(t[m][n][i], ROW ? alpha_t : product(alpha_t, beta_t));
          tile_loss += penalty<DISTANCE>(d, p.delta);
          const float e = ROW ? product(g, beta_s) - product(t[m][n][i], beta_t) : 0;  // D_ji
          if constexpr (C::GRAD) {
            const float slope = penalty_slope<DISTANCE>(d, p.delta);
            tile_h[m][i / 2] += slope * a;
            const float k = ROW ? slope * alpha_s + penalty_slope<DISTANCE>(e, p.delta) * beta_s : slope * scale;
            uint32_t first = nearest_tf32(k), rest = 0;
            if constexpr (C::K_TERMS == 2) split_float(k, first, rest);
            s[m][n][i] = as_float(first), t[m][n][i] = as_float(rest);
          } else if (ROW && mirrored) {
            tile_loss += penalty<DISTANCE>(e, p.delta);
          }
        }
    }
    loss += tile_loss * (!C::GRAD && !ROW && mirrored ? 2.f : 1.f);
#pragma unroll
    for (int m = 0; m < C::M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) h[m][half] += tile_h[m][half];
  }

  SRPKD_DEVICE void epilogue(Accumulator& s, Accumulator& t, const Scale& row_s, const Scale& row_t, Address scales,
                             bool mirrored, double& loss, Scale& h) const {
#define SRPKD_EPILOGUE(ROW, DISTANCE) \
  return epilogue<ROW, Distance::DISTANCE>(s, t, row_s, row_t, scales, mirrored, loss, h)
    if (p.row) {  // the same for all threads: a jump per tile
      if (p.distance == Distance::l1) SRPKD_EPILOGUE(true, l1);
      if (p.distance == Distance::l2) SRPKD_EPILOGUE(true, l2);
      SRPKD_EPILOGUE(true, huber);
    }
    if (p.distance == Distance::l1) SRPKD_EPILOGUE(false, l1);
    if (p.distance == Distance::l2) SRPKD_EPILOGUE(false, l2);
    SRPKD_EPILOGUE(false, huber);
#undef SRPKD_EPILOGUE
  }

  // U += K q_j over this warp's columns, for the channels of one panel. Each tile's share is summed up by itself and
  // added in float32: over thousands of tiles the tensor cores' truncating sums would drift.
  static SRPKD_DEVICE void add_to_U(PanelOfU& U, const Accumulator& K, const Accumulator& K_rest, Address features) {
#pragma unroll
    for (int c = 0; c < C::PANEL_CHANNELS; c += 16) {
      float sum[C::M_TILES][2][4] = {}, small[C::M_TILES][2][4] = {};
#pragma unroll
      for (int n = 0; n < C::N_TILES; n += C::NARROW ? 2 : 1) {
        uint32_t raw[4];
        load<C::PIXELS_ADJACENT, false>(raw, features, c, 8 * n);
#pragma unroll
        for (int j = 0; j < (C::NARROW ? 2 : 1); ++j)
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            uint32_t q[2][2];  // [term][half of k]
            if constexpr (C::NARROW) {
              q[0][0] = widen<Element, false>(raw[j + 2 * o]);
              q[0][1] = widen<Element, true>(raw[j + 2 * o]);
            } else {
              split_feature(raw[2 * o], q[0][0], q[1][0]);
              split_feature(raw[2 * o + 1], q[0][1], q[1][1]);
            }
#pragma unroll
            for (int m = 0; m < C::M_TILES; ++m) {
              const uint32_t a[4] = {as_bits(K[m][n + j][0]), as_bits(K[m][n + j][2]), as_bits(K[m][n + j][1]),
                                     as_bits(K[m][n + j][3])};
              if constexpr (C::K_TERMS == 2) {
                const uint32_t rest[4] = {as_bits(K_rest[m][n + j][0]), as_bits(K_rest[m][n + j][2]),
                                          as_bits(K_rest[m][n + j][1]), as_bits(K_rest[m][n + j][3])};
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

  // --- the whole -----------------------------------------------------------------------------------------------------

  SRPKD_DEVICE void load_row_scales(const float* alpha, Scale& to) const {
#pragma unroll
    for (int m = 0; m < C::M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_block * TILE + row_in_tile(m, half);
        to[m][half] = !alpha ? 1.f : row < p.pixels ? load_global(alpha + int64_t{image} * p.pixels + row) : 0.f;
      }
  }

  // A pixel's relation to itself counts as equal in both; NaN stays.
  SRPKD_DEVICE void untie(Accumulator& sum) const {
    for_each<C::M_TILES, C::N_TILES>([&](int m, int n, int i) {
      if (row_in_tile(m, i / 2) == column(n, i % 2)) sum[m][n][i] *= 0;
    });
  }

  SRPKD_DEVICE void run() {
    Scale row_s, row_t, h{};
    load_row_scales(p.features[1].alpha, row_s);
    load_row_scales(p.features[0].alpha, row_t);
    double loss = 0;
    PanelOfU U[C::GRAD ? C::U_PANELS : 1] = {};
    Accumulator s{}, t{};

    const int left = place_of_lane<!C::PIXELS_ADJACENT, true>(first_row, 0);
    const int right = place_of_lane<!C::PIXELS_ADJACENT, false>(first_column, 0);
    const int right_of_U = place_of_lane<C::PIXELS_ADJACENT, false>(0, first_column);
    // Every turn starts a copy and works on the panel that was started PREFETCH turns ago.
    int turns = walk.steps * panels + PREFETCH, item = -PREFETCH, slot = C::SLOTS - PREFETCH, block = walk.first;
    const int last_turn_of_rows = turns - panels;
#pragma unroll 1
    for (; turns > 0; --turns) {
      if (item >= 0) {
        wait_for_copies<PREFETCH - 1>();  // the panel is here,
        sync_block();                     // for all; and all are done with the one that the next copy overwrites
      }
      if (turns > PREFETCH) copy_next(slot_at(advanced(slot, PREFETCH)), turns > last_turn_of_rows);
      commit_copies();  // an empty group where there was no more to copy
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
      if (p.tied_diagonal && diagonal) untie(s), untie(t);
      epilogue(s, t, row_s, row_t, columns + PANEL, !diagonal, loss, h);
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
    RelationTiles(p).store(U, h, loss);  // all that it needs to know is computed anew rather than kept in registers
  }

  template <class F>
  static SRPKD_DEVICE void for_each_of_U(F f) {
#pragma unroll
    for (int u = 0; u < C::U_PANELS; ++u)
      for_each<C::M_TILES, C::PANEL_CHANNELS / 8>([&](int m, int n, int i) { f(u, m, n, i); });
  }

  // Sums up what the warps have for the same rows, in the order of their columns, and writes it.
  SRPKD_DEVICE void store(const PanelOfU (&U)[C::GRAD ? C::U_PANELS : 1], const Scale& h, double loss) const {
    constexpr int U_LINES = C::M_TILES * C::U_CHANNELS / 2;  // of a warp, 32 floats each
    const Address h_at = shared + (C::WARPS_N - 1) * C::WARPS_M * U_LINES * LINE,
                  loss_at = h_at + C::WARPS_N * TILE * 4;
    const auto line_of_U = [&](int warp_n, int u, int m, int n, int i) {
      const int line = ((u * C::M_TILES + m) * (C::PANEL_CHANNELS / 8) + n) * 4 + i;
      return shared + (((warp_n - 1) * C::WARPS_M + warp_m) * U_LINES + line) * LINE + lane * 4;
    };
    for (int lanes = 1; lanes < 32; lanes *= 2) loss += shuffle_xor(loss, lanes);
    if (lane == 0) store_shared(loss_at + thread / 32 * 8, loss);
    if constexpr (C::GRAD) {
#pragma unroll
      for (int m = 0; m < C::M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = h[m][half];
          sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);
          if (member == 0) store_shared(h_at + (warp_n * TILE + row_in_tile(m, half)) * 4, sum);
        }
      if (warp_n > 0)
        for_each_of_U([&](int u, int m, int n, int i) { store_shared(line_of_U(warp_n, u, m, n, i), U[u][m][n][i]); });
    }
    sync_block();

    if (channel_split == 0 && thread == 0) {
      double sum = 0;
      for (int warp = 0; warp < C::THREADS / 32; ++warp) sum += load_shared<double>(loss_at + warp * 8);
      store_global(p.loss + int64_t{image * p.splits + split} * p.blocks + row_block, sum);
    }
    if constexpr (C::GRAD) {
      const float factor = p.row ? 1.f : 2.f;  // P_ij and P_ji are one and the same unless p.row
      const int row = row_block * TILE + thread;
      if (channel_split == 0 && p.h && thread < TILE && row < p.pixels) {
        float sum = 0;
        for (int n = 0; n < C::WARPS_N; ++n) sum += load_shared<float>(h_at + (n * TILE + thread) * 4);
        store_global(p.h + int64_t{split * p.images + image} * p.pixels + row, factor * sum);
      }
      float* const own = p.U + split * p.U_strides[0] + image * p.U_strides[1];
      if (warp_n == 0)
        for_each_of_U([&](int u, int m, int n, int i) {
          float sum = U[u][m][n][i];
          for (int other = 1; other < C::WARPS_N; ++other) sum += load_shared<float>(line_of_U(other, u, m, n, i));
          const int row = row_block * TILE + row_in_tile(m, i / 2);
          const int channel = (u_first + u) * C::PANEL_CHANNELS + 8 * n + 2 * member + i % 2;
          if (row < p.pixels && channel < p.features[1].channels)
            store_global(own + row * p.U_strides[2] + channel * p.U_strides[3], factor * sum);
        });
    }
  }
};

#if defined(__CUDACC__)
template <class C>
__global__ void __launch_bounds__(C::THREADS, C::MIN_BLOCKS) relation_tiles(const __grid_constant__ Params p) {
  RelationTiles<C>(p).run();
}
#endif

}  // namespace srpkd::cuda
