// The gradient of the closed form, and the sum of the partial losses. Free of torch.
#pragma once

#include "../algebra/gradient.cuh"
#include "moments.cuh"

namespace srpkd::cuda::closed_form {

// Grid: (loss blocks + images * row blocks of 64 pixels, 1). A gradient block computes V of 64 channels at a time. The
// projection of "cosine" needs z . V over all channels: with more than 64, V is computed twice. DETACH_NORMS: without
// the projection.
template <class T, bool PIXELS_ADJACENT, bool DETACH_NORMS = false>
struct Gradient {
  using Arguments = closed_form::Arguments;
  using G = algebra::Geometry<2, PIXELS_ADJACENT>;
  using Part = PanelPart<T, PIXELS_ADJACENT>;
  static constexpr int THREADS = G::THREADS, MIN_BLOCKS = 2, UNIT = 4, TERMS = algebra::TERMS<T>;
  static constexpr int MATRIX_AT = TERMS * PANEL_BYTES, ALONG_AT = MATRIX_AT + MATRIX_TERMS * PANEL_BYTES;
  static constexpr int SHARED_BYTES = ALONG_AT + G::WARPS_N * G::ROWS * 4;
  // The gradient in shared memory: lines of adjacent elements, padded so that lines start in different banks.
  static constexpr int LINE_FLOATS = BLOCK + 4, LANES = 8;  // threads that sum the losses of one image
  static_assert(G::ROWS == BLOCK && BLOCK * LINE_FLOATS * 4 <= ALONG_AT && THREADS * 8 <= SHARED_BYTES);

  const Arguments& p;
  const sm80::Warp<G> warp{};
  const Address shared = shared_memory();
  const int row_blocks = static_cast<int>(ceil_div(p.pixels, BLOCK)), index = block_index(0) - p.loss_blocks;
  const int pixel = index % row_blocks * BLOCK, image = index / row_blocks;

  SRPKD_DEVICE explicit Gradient(const Arguments& arguments) : p(arguments) {}

  SRPKD_DEVICE void run() const {
    if (index < 0) return sum_losses();
    const int blocks = p.tiles.blocks_a;
    const bool project = p.alpha[STUDENT] != nullptr;
    sm80::RowVector<G> along{};
    if (DETACH_NORMS && project) {
      // D_ii counts as 0, but V includes it where only the teacher's norm is 0: D_ii = 1
      for (int m = 0; m < G::M_TILES; ++m)
        for (int half = 0; half < 2; ++half) along[m][half] = alpha_of(TEACHER, warp.row(m, half)) == 0 ? 4.f : 0.f;
    } else if (project && blocks > 1) {
#pragma unroll 1
      for (int block = 0; block < blocks; ++block) {
        algebra::Sums<G> V{}, z{};
        compute(block, V, z);
        add_dot(V, z, along);
      }
      exchange(along);
    }
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      algebra::Sums<G> V{}, z{};
      compute(block, V, z);
      if (project) {
        if (!DETACH_NORMS && blocks == 1) {
          add_dot(V, z, along);
          exchange(along);
        }
        algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) {
          V[m][n][i] = (V[m][n][i] - along[m][i / 2] * z[m][n][i]) * alpha_of(STUDENT, warp.row(m, i / 2));
        });
      }
      store(block, V);
    }
  }

  // Sums the losses of an image or of all, always in the same order.
  SRPKD_DEVICE void sum_losses() const {
    const int first = p.per_image ? block_index(0) : 0, count = p.per_image ? 1 : p.images, parts = p.tiles.count();
    const int lane = thread_index() % LANES, group = thread_index() / LANES;
    double total = 0;
    for (int of_group = 0; of_group < count; of_group += THREADS / LANES) {
      double sum = 0;
      if (of_group + group < count)
        for (int part = lane; part < parts; part += LANES)
          sum += load_global(p.losses + int64_t{first + of_group + group} * parts + part);
      store_shared(shared + thread_index() * 8, sum);
      sync_block();
      if (thread_index() == 0)
        for (int i = 0; i < THREADS; i += LANES) {
          double loss = 0;
          for (int j = 0; j < LANES; ++j) loss += load_shared<double>(shared + (i + j) * 8);
          total += loss < 0 ? 0 : loss;  // a sum of squares up to rounding; NaN stays
        }
      sync_block();
    }
    if (thread_index() == 0) store_global(p.loss + block_index(0), static_cast<float>(total * p.scale));
  }

  SRPKD_DEVICE float alpha_of(int network, int row) const {
    if (pixel + row >= p.pixels) return 0;
    return p.alpha[network] ? load_global(p.alpha[network] + int64_t{image} * p.pixels + pixel + row) : 1.f;
  }

  // Computes V and z of one block of channels. The teacher's and the student's products are added in the same order:
  // for equal features they cancel exactly.
  SRPKD_DEVICE void compute(int block, algebra::Sums<G>& V, algebra::Sums<G>& z) const {
    algebra::Sums<G> of_teacher{};
    add_products(TEACHER, block, of_teacher);
    add_products(STUDENT, block, V);
    algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) {
      const int row = warp.row(m, i / 2), column = warp.column(n, i % 2);
      const float alpha_s = alpha_of(STUDENT, row), alpha_t = alpha_of(TEACHER, row);
      V[m][n][i] = product(alpha_s, V[m][n][i]) + product(alpha_t, of_teacher[m][n][i]);
      // the student's panel of this block was the last
      z[m][n][i] = alpha_s * algebra::element<TERMS, PIXELS_ADJACENT, G>(shared, PANEL_BYTES, row, column);
    });
  }

  // Adds the products of a network's features with its factor. Its blocks of channels end with `block` if it has it.
  SRPKD_DEVICE void add_products(int network, int block, algebra::Sums<G>& total) const {
    const int blocks = network == STUDENT ? p.tiles.blocks_a : p.tiles.blocks_b;
    const uint16_t* const factor = p.factors[network] + image * elements_of_factor(p.tiles.blocks_a, blocks);
    algebra::Sums<G> sum{};
#pragma unroll 1
    for (int step = 1; step <= blocks; ++step) {
      const int k = (block + step) % blocks;
      Part part;
      part.load(p.features[network], image, {pixel, p.pixels}, k * BLOCK);
      sync_block();  // the panels are free
      algebra::copy_matrix<THREADS, G>(factor, block, k, blocks, shared + MATRIX_AT);
      commit_copies();
      part.template store<G>(shared, PANEL_BYTES);
      wait_for_copies<0>();
      sync_block();
      const Address a = shared + warp.template lane_offset<!PIXELS_ADJACENT, true>(warp.first_row, 0);
      const Address b = shared + MATRIX_AT + warp.template lane_offset<true, false>(warp.first_column, 0);
      add_product<G, !PIXELS_ADJACENT, true, TERMS, MATRIX_TERMS>(sum, a, PANEL_BYTES, b, PANEL_BYTES);
      move_sums<G>(total, sum);
    }
  }

  SRPKD_DEVICE void add_dot(const algebra::Sums<G>& V, const algebra::Sums<G>& z, sm80::RowVector<G>& along) const {
    algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) { along[m][i / 2] += V[m][n][i] * z[m][n][i]; });
  }

  // Adds the parts of the lanes and warps of a row.
  SRPKD_DEVICE void exchange(sm80::RowVector<G>& along) const {
    const auto place = [&](int m, int half, int warp_n) {
      return shared + ALONG_AT + (warp_n * G::ROWS + warp.row(m, half)) * 4;
    };
    for (int m = 0; m < G::M_TILES; ++m)
      for (int half = 0; half < 2; ++half) {
        float& sum = along[m][half];
        sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);
        if (warp.member == 0) store_shared(place(m, half, warp.warp_n), sum);
      }
    sync_block();
    for (int m = 0; m < G::M_TILES; ++m)
      for (int half = 0; half < 2; ++half)
        along[m][half] = load_shared<float>(place(m, half, 0)) + load_shared<float>(place(m, half, 1));
  }

  // Writes a block of channels to global memory, through shared memory so that all accesses are adjacent.
  SRPKD_DEVICE void store(int block, const algebra::Sums<G>& V) const {
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
