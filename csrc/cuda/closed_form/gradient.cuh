// The gradient of the closed form, and the sum of the partial losses. Free of torch.
#pragma once

#include "products.cuh"

namespace srpkd::cuda::closed_form {

// Grid: (loss blocks + images * row blocks of 64 pixels, 1). A gradient block computes V of 64 channels at a time. The
// projection of "cosine" needs z . V over all channels: with more than 64, V is computed twice. DETACH_NORMS: without
// the projection; not for "row".
template <class T, bool PIXELS_ADJACENT, bool ROW, bool DETACH_NORMS = false>
struct Gradient {
  using Arguments = closed_form::Arguments;
  using Products = PixelProducts<T, PIXELS_ADJACENT>;
  using G = typename Products::G;
  using Sums = typename Products::Sums;
  static constexpr int THREADS = Products::THREADS, MIN_BLOCKS = 2, SHARED_BYTES = Products::SHARED_BYTES;
  static constexpr int LANES = 8;  // threads that sum the losses of one image

  const Arguments& p;
  const int row_blocks = static_cast<int>(ceil_div(p.pixels, BLOCK)), index = block_index(0) - p.loss_blocks;
  const Products of{p, index / row_blocks, index % row_blocks * BLOCK};

  SRPKD_DEVICE explicit Gradient(const Arguments& arguments) : p(arguments) {}

  SRPKD_DEVICE void run() const {
    if (index < 0) return sum_losses();
    if constexpr (ROW)
      run_row();
    else
      run_symmetric();
  }

  // For "cosine" and "none".
  SRPKD_DEVICE void run_symmetric() const {
    const int blocks = p.tiles.blocks_a;
    const bool project = p.alpha[STUDENT] != nullptr;
    sm80::RowVector<G> along{};
    if (DETACH_NORMS && project) {
      // D_ii counts as 0, but V includes it where only the teacher's norm is 0: D_ii = 1
      for (int m = 0; m < G::M_TILES; ++m)
        for (int half = 0; half < 2; ++half)
          along[m][half] = of.alpha_of(TEACHER, of.warp.row(m, half)) == 0 ? 4.f : 0.f;
    } else if (project && blocks > 1) {
#pragma unroll 1
      for (int block = 0; block < blocks; ++block) {
        Sums V{}, z{};
        compute(block, V, z);
        of.add_dot(V, z, along);
      }
      of.exchange(along);
    }
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      Sums V{}, z{};
      compute(block, V, z);
      if (project) {
        if (!DETACH_NORMS && blocks == 1) {
          of.add_dot(V, z, along);
          of.exchange(along);
        }
        algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) {
          V[m][n][i] = (V[m][n][i] - along[m][i / 2] * z[m][n][i]) * of.alpha_of(STUDENT, of.warp.row(m, i / 2));
        });
      }
      of.store(block, V);
    }
  }

  // Computes V and z of one block of channels. The teacher's and the student's products are added in the same order:
  // for equal features they cancel exactly.
  SRPKD_DEVICE void compute(int block, Sums& V, Sums& z) const {
    Sums of_teacher{};
    of.add_products(TEACHER, p.factors[TEACHER], p.tiles.blocks_a, block, of_teacher);
    of.add_products(STUDENT, p.factors[STUDENT], p.tiles.blocks_a, block, V);
    algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) {
      const int row = of.warp.row(m, i / 2), column = of.warp.column(n, i % 2);
      const float alpha_s = of.alpha_of(STUDENT, row), alpha_t = of.alpha_of(TEACHER, row);
      V[m][n][i] = product(alpha_s, V[m][n][i]) + product(alpha_t, of_teacher[m][n][i]);
      z[m][n][i] = alpha_s * of.feature(row, column);  // the student's panel of this block was the last
    });
  }

  // For "row". The factors are twice those of the gradient.
  SRPKD_DEVICE void run_row() const {
    const float gain_s = load_global(p.gains[STUDENT] + of.image), gain_t = load_global(p.gains[TEACHER] + of.image);
#pragma unroll 1
    for (int block = 0; block < p.tiles.blocks_a; ++block) {
      Sums V{};
      {
        Sums of_teacher{};
        of.add_products(TEACHER, p.raw_factors[TEACHER], p.tiles.blocks_a, block, of_teacher);
        of.add_products(STUDENT, p.raw_factors[STUDENT], p.tiles.blocks_a, block, V);
        algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) {
          const int row = of.warp.row(m, i / 2);
          const float alpha_s = of.alpha_of(STUDENT, row), alpha_t = of.alpha_of(TEACHER, row);
          V[m][n][i] =
              alpha_s * (product(alpha_s * (1 - distance_of(row)), V[m][n][i]) + product(alpha_t, of_teacher[m][n][i]));
        });
      }
      Sums of_student{}, of_teacher{};
      of.add_products(TEACHER, p.factors[TEACHER], p.tiles.blocks_a, block, of_teacher);
      of.add_products(STUDENT, p.factors[STUDENT], p.tiles.blocks_a, block, of_student);
      algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) {
        V[m][n][i] += gain_s * (product(gain_s, of_student[m][n][i]) + product(gain_t, of_teacher[m][n][i]));
        V[m][n][i] *= 0.5f;
      });
      of.store(block, V);
    }
  }

  SRPKD_DEVICE float distance_of(int row) const {
    if (of.pixel + row >= p.pixels) return 0;
    return load_global(p.distances + int64_t{of.image} * p.pixels + of.pixel + row);
  }

  // Sums the losses of an image or of all, always in the same order.
  SRPKD_DEVICE void sum_losses() const {
    const int first = p.per_image ? block_index(0) : 0, count = p.per_image ? 1 : p.images, parts = p.loss_parts;
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
    if (thread_index() == 0) store_global(p.loss + block_index(0), static_cast<float>(total * p.scale));
  }
};

}  // namespace srpkd::cuda::closed_form
