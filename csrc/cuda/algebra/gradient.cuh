// The gradient with respect to the raw features from the tiles' sums, see formulas.gradient_of, and the loss. Free of
// torch.
#pragma once

#include "matrices.cuh"
#include "sums.cuh"

namespace srpkd::cuda::algebra {

// Writes `valid` adjacent elements of the gradient, pixels or channels, of which the first is given, times the scale.
template <class T, bool PIXELS_ADJACENT, class Arguments>
SRPKD_DEVICE void store_gradient_unit(const Arguments& p, int image, float (&x)[4], int pixel, int channel, int valid) {
  constexpr bool NARROW = std::is_same_v<T, BFloat16>;
  using Bits = std::conditional_t<NARROW, uint16_t, uint32_t>;
  const auto scale = static_cast<float>(p.scale);
  const int64_t step = p.gradient_strides[PIXELS_ADJACENT ? 1 : 2];
  Bits* const to = static_cast<Bits*>(p.gradient) + image * p.gradient_strides[0] + pixel * p.gradient_strides[1] +
                   channel * p.gradient_strides[2];
  uint32_t word[NARROW ? 2 : 4];
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] *= scale;
  if constexpr (NARROW) {
    word[0] = pack<BFloat16>(x[0], x[1]), word[1] = pack<BFloat16>(x[2], x[3]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) word[e] = as_bits(x[e]);
  }
  if (step == 1 && valid == 4 && reinterpret_cast<uintptr_t>(to) % sizeof word == 0) return store_words(to, word);
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (e < valid) store_global(to + e * step, static_cast<Bits>(NARROW ? word[e / 2] >> e % 2 * 16 : word[e]));
}

// Grid: (loss blocks + gradient blocks, 1). A gradient block computes ROWS pixels x 64 channels of
//
//   none      U
//   cosine    U - w q
//   row       U - w M q - M_w q     with w = h alpha^2
//
// times the scale. For "row" tensor cores compute both products; they reach the other layout through shared memory, so
// that all accesses to global memory are adjacent.
template <class T, bool PIXELS_ADJACENT, int WARPS_M, class SumsOfTiles>
struct Gradient {
  using Arguments = GradientArguments<SumsOfTiles>;
  using G = Geometry<WARPS_M, PIXELS_ADJACENT, 2>;
  using Part = PanelPart<T, PIXELS_ADJACENT>;
  static constexpr int THREADS = G::THREADS, MIN_BLOCKS = WARPS_M == 2 ? 3 : TERMS<T> < 3 ? 2 : 1, UNIT = 4;
  static constexpr int TERM_BYTES = G::ROWS / BLOCK * PANEL_BYTES, MATRIX_BYTES = MATRIX_TERMS * PANEL_BYTES;
  static constexpr int MOMENT_AT = TERMS<T> * TERM_BYTES, WEIGHTED_AT = MOMENT_AT + MATRIX_BYTES;
  static constexpr int WEIGHTS_AT = WEIGHTED_AT + MATRIX_BYTES, ROW_SHARED_BYTES = WEIGHTS_AT + G::ROWS * 4;
  // The correction in shared memory, from which U is subtracted if its order is another: lines of adjacent elements,
  // padded so that lines start in different banks.
  static constexpr int LINE_FLOATS = (PIXELS_ADJACENT ? G::ROWS : BLOCK) + 4;
  static constexpr int LINES_BYTES = (PIXELS_ADJACENT ? BLOCK : G::ROWS) * LINE_FLOATS * 4;
  static_assert(LINES_BYTES <= WEIGHTS_AT);
  static constexpr bool PERMUTED = SumsOfTiles::PERMUTED;
  static constexpr int OTHER_WEIGHTS_AT = PERMUTED ? LINES_BYTES : 0;
  static constexpr int OTHER_SHARED_BYTES = OTHER_WEIGHTS_AT + G::ROWS * 4;  // or the sums of the warps
  static_assert(THREADS / 32 * 8 <= G::ROWS * 4);

  const Arguments& p;
  const BlockIndex own_block;
  const sm80::Warp<G> warp{};
  const Address shared = shared_memory();
  const int channels = p.features.channels, blocks = blocks_of(channels);
  const int row_blocks = static_cast<int>(ceil_div(p.pixels, G::ROWS));
  const int index = own_block.x - p.loss_blocks, channel = index % blocks * BLOCK;
  const int pixel = index / blocks % row_blocks * G::ROWS, image = index / blocks / row_blocks;
  const bool row = p.normalize == Normalize::row;
  const Address weights = shared + (row ? WEIGHTS_AT : OTHER_WEIGHTS_AT);

  SRPKD_DEVICE Gradient(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  SRPKD_DEVICE void run() const {
    if (index < 0) return sum_losses();
    if (p.normalize != Normalize::none) {
      const float size = row ? load_global(p.size + image * 2 + STUDENT) : 1.f;
      for (int i = thread_index(); i < G::ROWS; i += THREADS)
        store_shared(weights + i * 4,
                     pixel + i < p.pixels ? weight_of(p.sums, p.alpha, size, image, p.pixels, pixel + i) : 0.f);
      sync_block();
    }
    if (row) store_products();
    if constexpr (PERMUTED) arrange_U();
    store_gradient();
  }

  // Sums the losses of an image or of all, always in the same order.
  SRPKD_DEVICE void sum_losses() const {
    const int part = own_block.x, count = p.sums.loss_parts * (p.per_image ? 1 : p.images);
    const int64_t first = int64_t{part} * count;
    double sum = 0;
    for (int i = thread_index(); i < count; i += THREADS) sum += loss_of(p.sums, first + i);
    sum = sum_of_threads<THREADS>(sum, shared);
    if (thread_index() == 0) store_global(p.loss + part, static_cast<float>(sum * p.scale));
  }

  SRPKD_DEVICE Address correction_at(int row_of_block, int column) const {
    return shared + (PIXELS_ADJACENT ? column * LINE_FLOATS + row_of_block : row_of_block * LINE_FLOATS + column) * 4;
  }

  // Computes w M q + M_w q and leaves it in shared memory.
  SRPKD_DEVICE void store_products() const {
    const int64_t matrices = image * elements_of_terms(channels);
    const int panel = thread_index() / PANEL_THREADS;
    Sums<G> total{}, sum{};
    sm80::RowVector<G> w;
    for (int m = 0; m < G::M_TILES; ++m)
      for (int half = 0; half < 2; ++half) w[m][half] = load_shared<float>(weights + warp.row(m, half) * 4);
#pragma unroll 1
    for (int k = 0; k < blocks; ++k) {
      Part part;
      part.load(p.features, image, {pixel + panel * BLOCK, p.pixels}, k * BLOCK);
      if (k > 0) sync_block();  // the panels are free
      copy_matrix<THREADS, G>(p.moment + matrices, channel / BLOCK, k, blocks, shared + MOMENT_AT);
      copy_matrix<THREADS, G>(p.weighted + matrices, channel / BLOCK, k, blocks, shared + WEIGHTED_AT);
      commit_copies();
      part.template store<G>(shared + panel * PANEL_BYTES, TERM_BYTES);
      wait_for_copies<0>();
      sync_block();
      const Address a = shared + warp.template lane_offset<!PIXELS_ADJACENT, true>(warp.first_row, 0);
      const Address b = shared + warp.template lane_offset<true, false>(warp.first_column, 0);
      const auto add_product_with = [&](int matrix_at) {
        add_product<G, !PIXELS_ADJACENT, true, TERMS<T>, MATRIX_TERMS>(sum, a, TERM_BYTES, b + matrix_at, PANEL_BYTES);
      };
      add_product_with(MOMENT_AT);
      for_each<G::M_TILES, G::N_TILES>(
          [&](int m, int n, int i) { total[m][n][i] += w[m][i / 2] * sum[m][n][i], sum[m][n][i] = 0; });
      add_product_with(WEIGHTED_AT);
      move_sums<G>(total, sum);
    }
    sync_block();  // the panels are free
    for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) {
      store_shared(correction_at(warp.row(m, i / 2), warp.column(n, i % 2)), total[m][n][i]);
    });
    sync_block();
  }

  // Leaves U, less the correction if there is one, in the lines.
  SRPKD_DEVICE void arrange_U() const {
    const auto place = [&](int r, int c, float first, float second) {
      const Address to = correction_at(r, c), next = correction_at(r + 1, c);
      store_shared(to, row ? first - load_shared<float>(to) : first);
      store_shared(next, row ? second - load_shared<float>(next) : second);
    };
    for_each_U(Constant<THREADS>{}, Constant<G::ROWS>{}, p.sums, image, pixel, channel, place);
    sync_block();
  }

  // Returns adjacent elements of U, less those of row's correction.
  SRPKD_DEVICE Raw<float, UNIT> corrected_U(int r, int c, int valid) const {
    Raw<float, UNIT> result;
    if constexpr (PERMUTED) {
      const auto words = load_shared<sm80::Words>(correction_at(r, c));
#pragma unroll
      for (int e = 0; e < UNIT; ++e) result.word[e] = words.word[e];
    } else {
      result = U_of<PIXELS_ADJACENT>(p.sums, image, pixel + r, channel + c, valid);
      if (row) {
        const auto correction = load_shared<sm80::Words>(correction_at(r, c));
#pragma unroll
        for (int e = 0; e < UNIT; ++e) result.word[e] = as_bits(result[e] - as_float(correction.word[e]));
      }
    }
    return result;
  }

  SRPKD_DEVICE void store_gradient() const {
    constexpr int PER_LINE = (PIXELS_ADJACENT ? G::ROWS : BLOCK) / UNIT;
    const T* const data = static_cast<const T*>(p.features.data) + image * p.features.image_stride;
#pragma unroll 1
    for (int i = thread_index(); i < G::ROWS * BLOCK / UNIT; i += THREADS) {
      const int line = i / PER_LINE, place = i % PER_LINE * UNIT;
      const int r = PIXELS_ADJACENT ? place : line, c = PIXELS_ADJACENT ? line : place;
      const int left = PIXELS_ADJACENT ? p.pixels - pixel - r : channels - channel - c;
      const int valid = left < UNIT ? left : UNIT;
      if (valid <= 0 || pixel + r >= p.pixels || channel + c >= channels) continue;
      const Raw<float, UNIT> U = corrected_U(r, c, valid);
      float x[UNIT];
#pragma unroll
      for (int e = 0; e < UNIT; ++e) x[e] = U[e];
      if (p.normalize == Normalize::cosine) {
        const int64_t at = PIXELS_ADJACENT ? (channel + c) * p.features.line_stride + pixel + r
                                           : (pixel + r) * p.features.line_stride + channel + c;
        Raw<T, UNIT> q;
        q.load(data + at, valid, p.features.copy_bytes == 16);
#pragma unroll
        for (int e = 0; e < UNIT; ++e) x[e] -= load_shared<float>(weights + (PIXELS_ADJACENT ? r + e : r) * 4) * q[e];
      }
      store_gradient_unit<T, PIXELS_ADJACENT>(p, image, x, pixel + r, channel + c, valid);
    }
  }
};

}  // namespace srpkd::cuda::algebra
