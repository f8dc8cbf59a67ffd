// Products of features with the factors that the moments give. Free of torch.
#pragma once

#include "../algebra/gradient.cuh"
#include "moments.cuh"

namespace srpkd::cuda::closed_form {

// The factors of the teacher and of the student.
struct Factors {
  const uint16_t *teacher, *student;
  SRPKD_DEVICE const uint16_t* operator[](int network) const { return network == STUDENT ? student : teacher; }
};

// Products of 64 pixels of both networks with factors, 64 columns at a time.
template <class T, bool PIXELS_ADJACENT, class Term>
struct PixelProducts {
  using G = algebra::Geometry<2, PIXELS_ADJACENT, 2>;
  using Part = PanelPart<T, PIXELS_ADJACENT>;
  using Sums = algebra::Sums<G>;
  static constexpr int THREADS = G::THREADS, UNIT = 4, TERMS = FEATURE_TERMS<T, Term>;
  static constexpr bool HALF = std::is_same_v<Term, Half>;  // see FEATURE_TERMS
  // Whether the next panels are loaded while the present ones are multiplied: float32 features need too many registers.
  static constexpr bool LOADS_AHEAD = sizeof(T) == 2;
  static constexpr int SLOTS = LOADS_AHEAD ? 2 : 1;  // of a panel of features and one of a factor
  static constexpr int FEATURE_BYTES = TERMS * PANEL_BYTES, MATRIX_AT = SLOTS * FEATURE_BYTES;
  static constexpr int MATRIX_BYTES = algebra::TERMS_OF_MATRIX<Term> * PANEL_BYTES;
  static constexpr int ALONG_AT = MATRIX_AT + SLOTS * MATRIX_BYTES;
  static constexpr int SCALES_AT = ALONG_AT + G::WARPS_N * G::ROWS * 4;
  static constexpr int SHARED_BYTES = SCALES_AT + (HALF ? 4 * BLOCK * 4 : 0);
  // The gradient in shared memory: lines of adjacent elements, padded so that lines start in different banks.
  static constexpr int LINE_FLOATS = BLOCK + 4;
  static_assert(G::ROWS == BLOCK && BLOCK * LINE_FLOATS * 4 <= ALONG_AT && THREADS * 8 <= SHARED_BYTES);

  const Arguments& p;
  const int image, pixel;
  const sm80::Warp<G> warp{};
  const Address shared = shared_memory();

  SRPKD_DEVICE int blocks_of(int network) const { return network == STUDENT ? p.tiles.blocks_a : p.tiles.blocks_b; }

  // Returns the values of the rows of this thread, 1 if there are none, and 0 beyond the last pixel.
  SRPKD_DEVICE void load_rows(const float* values, sm80::RowVector<G>& rows) const {
    for_each_row([&](int m, int half) {
      const int row = pixel + warp.row(m, half);
      rows[m][half] = row >= p.pixels ? 0.f : values ? load_global(values + int64_t{image} * p.pixels + row) : 1.f;
    });
  }

  template <class F>
  static SRPKD_DEVICE void for_each_row(F f) {
#pragma unroll
    for (int m = 0; m < G::M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(m, half);
  }

  // Returns a feature of the network and the block of channels of the last product.
  SRPKD_DEVICE float feature(int row, int column) const {
    return algebra::element<TERMS, PIXELS_ADJACENT, G, Term>(shared, PANEL_BYTES, row, column);
  }

  SRPKD_DEVICE Address scale_at(int network, int row) const { return shared + SCALES_AT + (network * BLOCK + row) * 4; }
  SRPKD_DEVICE Address weight_at(int network, int row) const { return scale_at(2 + network, row); }

  // Splits the scales of the pixels into those of the panels, and the weights of their products, times `unit`. They are
  // in shared memory before the first product.
  SRPKD_DEVICE void store_scales(float unit) const {
    const int network = thread_index() / BLOCK, row = thread_index() % BLOCK;
    const float alpha =
        pixel + row < p.pixels ? load_global(p.alpha[network] + int64_t{image} * p.pixels + pixel + row) : 0.f;
    store_shared(scale_at(network, row), power_of_two_of(alpha) * LARGEST_TERM);
    store_shared(weight_at(network, row), mantissa_of(alpha) * unit);
  }

  SRPKD_DEVICE Address features_at(int slot) const { return shared + slot % SLOTS * FEATURE_BYTES; }
  SRPKD_DEVICE Address matrix_at(int slot) const { return shared + MATRIX_AT + slot % SLOTS * MATRIX_BYTES; }

  SRPKD_DEVICE void store_panel(const Part& part, int network, Address to) const {
    if constexpr (HALF)
      part.template store<TERMS, G, Half>(
          to, PANEL_BYTES, [&](float x, int row, int) { return x * load_shared<float>(scale_at(network, row)); });
    else
      part.template store<G>(to, PANEL_BYTES);
  }

  // Multiplies panels of the networks from `first` to `last` with block `block` of the `rows` blocks of their factors,
  // and calls use(network, product, whether it is the network's last panel) for each. The networks take turns. The last
  // panels have the block of channels `block` if the network has it, and the very last remains in slot 0. SYMMETRIC:
  // for the quadratic form alone, in which the blocks (n, k) with k > n count twice, and those with k < n are left out.
  template <bool SYMMETRIC = false, class Use>
  SRPKD_DEVICE void multiply(int first, int last, const Factors& factors, int rows, int block, Use use) const {
    const auto steps_of = [&](int network) { return blocks_of(network) - (SYMMETRIC ? block : 0); };
    // the network and the block of channels, counted from `block`, of the panel that is loaded next
    int network = last, ahead = steps_of(first) > steps_of(last) ? steps_of(first) : steps_of(last);
    int left = steps_of(last) + (first < last ? steps_of(first) : 0);
    const auto advance = [&] {
      do
        if (network < last)
          ++network;
        else
          network = first, --ahead;
      while (ahead >= steps_of(network));
    };
    Part part;
    int k = 0;
    const auto load = [&] {
      advance();
      k = static_cast<int>(static_cast<unsigned>(block + ahead) % static_cast<unsigned>(blocks_of(network)));
      part.load(p.features[network], image, {pixel, p.pixels}, k * BLOCK);
    };
    const auto copy = [&](int slot) {
      const int blocks = blocks_of(network);
      algebra::copy_matrix<THREADS, G, Term>(factors[network] + image * elements_of_factor(rows, blocks), block, k,
                                             blocks, matrix_at(slot));
      commit_copies();
    };
    Sums sum{};
    load();
    sync_block();  // the panels are free
    copy(left - 1);
#pragma unroll 1
    while (left-- > 0) {
      const int present = network;
      const bool is_last = ahead == 0;
      const Address a = features_at(left), b = matrix_at(left);
      store_panel(part, network, a);
      wait_for_copies<0>();
      sync_block();  // the panels have arrived, and those of the other slot are free
      if (LOADS_AHEAD && left > 0) load(), copy(left - 1);
      add_product<G, !PIXELS_ADJACENT, true, TERMS, algebra::TERMS_OF_MATRIX<Term>, Term>(
          sum, a + warp.template lane_offset<!PIXELS_ADJACENT, true>(warp.first_row, 0), PANEL_BYTES,
          b + warp.template lane_offset<true, false>(warp.first_column, 0), PANEL_BYTES);
      use(present, sum, is_last);
      algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) { sum[m][n][i] = 0; });
      if (LOADS_AHEAD || left == 0) continue;
      load();
      sync_block();  // the panels are free
      copy(left - 1);
    }
  }

  // Adds the parts of the lanes and warps of a row.
  SRPKD_DEVICE void exchange(sm80::RowVector<G>& along) const {
    const auto place = [&](int m, int half, int warp_n) {
      return shared + ALONG_AT + (warp_n * G::ROWS + warp.row(m, half)) * 4;
    };
    for_each_row([&](int m, int half) {
      float& sum = along[m][half];
      sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);
      if (warp.member == 0) store_shared(place(m, half, warp.warp_n), sum);
    });
    sync_block();
    for_each_row([&](int m, int half) {
      along[m][half] = load_shared<float>(place(m, half, 0)) + load_shared<float>(place(m, half, 1));
    });
  }

  // Writes a block of channels to global memory, through shared memory so that all accesses are adjacent.
  SRPKD_DEVICE void store(int block, const Sums& V) const {
    const auto place = [&](int row, int column) {
      return shared + (PIXELS_ADJACENT ? column * LINE_FLOATS + row : row * LINE_FLOATS + column) * 4;
    };
    sync_block();  // the panels are free
    algebra::for_each<G::M_TILES, G::N_TILES>(
        [&](int m, int n, int i) { store_shared(place(warp.row(m, i / 2), warp.column(n, i % 2)), V[m][n][i]); });
    sync_block();
#pragma unroll 1
    for (int i = thread_index(); i < BLOCK * BLOCK / UNIT; i += THREADS) {
      const int line = i / (BLOCK / UNIT), first = i % (BLOCK / UNIT) * UNIT;
      const int row = PIXELS_ADJACENT ? first : line, column = PIXELS_ADJACENT ? line : first;
      const int pixels = p.pixels - pixel - row, channels = p.features[STUDENT].channels - block * BLOCK - column;
      if (pixels <= 0 || channels <= 0) continue;
      const auto words = load_shared<sm80::Words>(place(row, column));
      float x[UNIT];
#pragma unroll
      for (int e = 0; e < UNIT; ++e) x[e] = as_float(words.word[e]);
      algebra::store_gradient_unit<T, PIXELS_ADJACENT>(p, image, x, pixel + row, block * BLOCK + column,
                                                       minimum(PIXELS_ADJACENT ? pixels : channels, UNIT));
    }
  }
};

}  // namespace srpkd::cuda::closed_form
