// The gradient of the closed form, and the sum of the partial losses. Free of torch.
#pragma once

#include "products.cuh"

namespace srpkd::cuda::closed_form {

// Grid: (loss blocks + images * row blocks of 64 pixels, 1). A gradient block computes V of 64 channels at a time. The
// projection of "cosine" needs z . V over all channels: with more than 64, V is computed twice. DETACH_NORMS: without
// the projection; only for "cosine".
template <class T, bool PIXELS_ADJACENT, Normalize NORMALIZE, bool DETACH_NORMS = false>
struct Gradient {
  using Arguments = closed_form::Arguments;
  static constexpr bool ROW = NORMALIZE == Normalize::row, COSINE = NORMALIZE == Normalize::cosine;
  using Products = PixelProducts<T, PIXELS_ADJACENT, std::conditional_t<COSINE, Half, BFloat16>>;
  using G = typename Products::G;
  using Sums = typename Products::Sums;
  static constexpr bool MANY_REGISTERS = ROW || DETACH_NORMS || sizeof(T) == 4;  // three blocks would spill
  static constexpr int THREADS = Products::THREADS, MIN_BLOCKS = MANY_REGISTERS ? 2 : 3,
                       SHARED_BYTES = Products::SHARED_BYTES;
  static constexpr int LANES = 8;  // threads that sum the losses of one image

  const Arguments& p;
  const BlockIndex own_block;
  const int row_blocks = static_cast<int>(ceil_div(p.pixels, BLOCK)), index = own_block.x - p.loss_blocks;
  const Products of{p, index / row_blocks, index % row_blocks * BLOCK};

  SRPKD_DEVICE Gradient(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  SRPKD_DEVICE void run() const {
    if (index < 0) return sum_losses();
    if constexpr (ROW)
      run_row();
    else
      run_symmetric();
  }

  // For "cosine" and "none".
  SRPKD_DEVICE void run_symmetric() const {
    constexpr bool PROJECTS = COSINE && !DETACH_NORMS;
    const int blocks = p.tiles.blocks_a;
    sm80::RowVector<G> along{};
    if constexpr (COSINE) of.store_scales(1 / (LARGEST_TERM * p.factor_scale));
    const auto weight_of = [&](int network, int row) {
      return COSINE ? load_shared<float>(of.weight_at(network, row)) : 1.f;
    };
    // The projection is complete after the first `blocks` steps. With several, the second pass computes V again.
    const int steps = PROJECTS && blocks > 1 ? 2 * blocks : blocks;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int block = step < blocks ? step : step - blocks;
      Sums V{}, z;
      add_pair({p.factors[TEACHER], p.factors[STUDENT]}, block, V,
               [&](int network, int m, int half) { return weight_of(network, of.warp.row(m, half)); });
      if constexpr (COSINE)
        algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) {
          const int row = of.warp.row(m, i / 2), column = of.warp.column(n, i % 2);
          z[m][n][i] = weight_of(STUDENT, row) * p.factor_scale * of.feature(row, column);
        });
      if constexpr (PROJECTS)
        if (step < blocks) {
          algebra::for_each<G::M_TILES, G::N_TILES>(
              [&](int m, int n, int i) { along[m][i / 2] += V[m][n][i] * z[m][n][i]; });
          if (step == blocks - 1) of.exchange(along);
        }
      if (step < steps - blocks) continue;
      if constexpr (COSINE) {
        sm80::RowVector<G> alpha;
        of.load_rows(p.alpha[STUDENT], alpha);
        // D_ii counts as 0, but V includes it where only the teacher's norm is 0: D_ii = 1
        if (DETACH_NORMS)
          Products::for_each_row(
              [&](int m, int half) { along[m][half] = weight_of(TEACHER, of.warp.row(m, half)) == 0 ? 4.f : 0.f; });
        algebra::for_each<G::M_TILES, G::N_TILES>(
            [&](int m, int n, int i) { V[m][n][i] = (V[m][n][i] - along[m][i / 2] * z[m][n][i]) * alpha[m][i / 2]; });
      }
      of.store(block, V);
    }
  }

  // Adds the products of both networks with a block of channels of their factors, times weight(network, m, half) of the
  // rows. For equal features, each product of the teacher cancels exactly with the next one of the student. The
  // student's panel of this block is the last.
  template <class Weight>
  SRPKD_DEVICE void add_pair(const Factors& factors, int block, Sums& V, Weight weight) const {
    of.multiply(TEACHER, STUDENT, factors, p.tiles.blocks_a, block, [&](int network, const Sums& sums, bool) {
      sm80::RowVector<G> weights;
      Products::for_each_row([&](int m, int half) { weights[m][half] = weight(network, m, half); });
      algebra::for_each<G::M_TILES, G::N_TILES>(
          [&](int m, int n, int i) { V[m][n][i] += product(weights[m][i / 2], sums[m][n][i]); });
    });
  }

  // For "row". The factors are twice those of the gradient.
  SRPKD_DEVICE void run_row() const {
    sm80::RowVector<G> alpha, weights[2];
    float gains[2];
    for (int i = 0; i < 2; ++i) gains[i] = load_global(p.gains[i] + of.image);
    of.load_rows(p.alpha[TEACHER], weights[TEACHER]);
    of.load_rows(p.alpha[STUDENT], alpha);
    of.load_rows(p.distances, weights[STUDENT]);
    Products::for_each_row(
        [&](int m, int half) { weights[STUDENT][m][half] = alpha[m][half] * (1 - weights[STUDENT][m][half]); });
#pragma unroll 1
    for (int block = 0; block < p.tiles.blocks_a; ++block) {
      Sums V{}, raw{};
      add_pair({p.raw_factors[TEACHER], p.raw_factors[STUDENT]}, block, V, [&](int network, int m, int half) {
        return network == STUDENT ? weights[STUDENT][m][half] : weights[TEACHER][m][half];
      });
      add_pair({p.factors[TEACHER], p.factors[STUDENT]}, block, raw,
               [&](int network, int, int) { return network == STUDENT ? gains[STUDENT] : gains[TEACHER]; });
      algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) {
        V[m][n][i] = 0.5f * (alpha[m][i / 2] * V[m][n][i] + gains[STUDENT] * raw[m][n][i]);
      });
      of.store(block, V);
    }
  }

  // Sums the losses of an image or of all, always in the same order.
  SRPKD_DEVICE void sum_losses() const {
    const int first = p.per_image ? own_block.x : 0, count = p.per_image ? 1 : p.images, parts = p.loss_parts;
    const int lane = thread_index() % LANES, group = thread_index() / LANES;
    double total = 0;
    for (int of_group = 0; of_group < count; of_group += THREADS / LANES) {
      double sum = 0;
      if (of_group + group < count)
        for (int part = lane; part < parts; part += LANES)
          sum += load_global(p.losses + int64_t{first + of_group + group} * parts + part);
      store_shared(of.shared + thread_index() * 8, sum);
      sync_block();
      if (thread_index() == 0)
        for (int i = 0; i < THREADS; i += LANES) {
          double loss = 0;
          for (int j = 0; j < LANES; ++j) loss += load_shared<double>(of.shared + (i + j) * 8);
          total += loss < 0 ? 0 : loss;  // a sum of squares up to rounding; NaN stays
        }
      sync_block();
    }
    if (thread_index() == 0) store_global(p.loss + own_block.x, static_cast<float>(total * p.scale));
  }
};

}  // namespace srpkd::cuda::closed_form
