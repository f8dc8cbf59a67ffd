// What only "row" needs: the scales and distances of its rows, and the second stage. Free of torch.
#pragma once

#include "products.cuh"

namespace srpkd::cuda::closed_form {

// Grid: (images * row blocks of 64 pixels, 1). With the factors of the first stage, computes the squared row norms
// q_i . M_ss q_i and p_i . M_tt p_i, hence the scales, and with q_i . M_st p_i the distances of the rows. In the direct
// form also the partial losses.
template <class T, bool PIXELS_ADJACENT>
struct RowScales {
  using Arguments = closed_form::Arguments;
  using Products = PixelProducts<T, PIXELS_ADJACENT, BFloat16>;
  using G = typename Products::G;
  using Sums = typename Products::Sums;
  static constexpr int THREADS = Products::THREADS, MIN_BLOCKS = 2, SHARED_BYTES = Products::SHARED_BYTES;

  const Arguments& p;
  const BlockIndex own_block;
  const int row_blocks = static_cast<int>(ceil_div(p.pixels, BLOCK));
  const Products of{p, own_block.x / row_blocks, own_block.x % row_blocks * BLOCK};
  const float gain_s = load_global(p.gains[STUDENT] + of.image), gain_t = load_global(p.gains[TEACHER] + of.image);

  SRPKD_DEVICE RowScales(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  // For equal features the three sums are equal or opposite, because they are added in the same order.
  SRPKD_DEVICE void run() const {
    sm80::RowVector<G> ss{}, st{}, tt{};  // 4 q . M_ss q, -4 q . M_st p, 4 p . M_tt p
#pragma unroll 1
    for (int block = 0; block < p.tiles.blocks_a; ++block) {
      Sums student{}, teacher{};
      of.multiply(TEACHER, STUDENT, {p.factors[TEACHER], p.factors[STUDENT]}, p.tiles.blocks_a, block,
                  [&](int network, const Sums& sums, bool) {
                    if (network == STUDENT)
                      add(student, sums);
                    else
                      add(teacher, sums);
                  });
      add_dot(student, ss), add_dot(teacher, st);
    }
    const Factors factors{p.teacher_factor, nullptr};
#pragma unroll 1
    for (int block = 0; block < p.tiles.blocks_b; ++block) {
      Sums teacher{};
      if (p.difference)
        of.multiply(TEACHER, TEACHER, factors, p.tiles.blocks_b, block,
                    [&](int, const Sums& sums, bool) { add(teacher, sums); });
      else  // a third fewer products
        of.template multiply<true>(TEACHER, TEACHER, factors, p.tiles.blocks_b, block,
                                   [&](int, const Sums& sums, bool is_last) {
                                     add(teacher, sums);
                                     if (!is_last) add(teacher, sums);
                                   });
      add_dot(teacher, tt);
    }
    for (auto* sums : {&ss, &st, &tt}) {
      of.exchange(*sums);
      sync_block();  // their place in shared memory is free
    }
    if (of.warp.warp_n == 0 && of.warp.member == 0)
      for (int m = 0; m < G::M_TILES; ++m)
        for (int half = 0; half < 2; ++half) store(of.warp.row(m, half), ss[m][half], st[m][half], tt[m][half]);
    if (p.difference) return;
    sync_block();
    const double of_row = thread_index() < BLOCK ? load_shared<double>(of.shared + thread_index() * 8) : 0.0;
    const double loss = sum_of_threads<THREADS>(of_row, of.shared + BLOCK * 8);
    if (thread_index() == 0) store_global(p.losses + own_block.x, loss);
  }

  SRPKD_DEVICE static void add(Sums& to, const Sums& from) {
    algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) { to[m][n][i] += from[m][n][i]; });
  }

  SRPKD_DEVICE void add_dot(const Sums& sums, sm80::RowVector<G>& to) const {
    algebra::for_each<G::M_TILES, G::N_TILES>([&](int m, int n, int i) {
      to[m][i / 2] += sums[m][n][i] * of.feature(of.warp.row(m, i / 2), of.warp.column(n, i % 2));
    });
  }

  // Returns alpha from the square of 2 gain norm; rounding can make it slightly negative.
  SRPKD_DEVICE float alpha_of(float square, float gain) const {
    const float root = sqrtf(square < 0 ? 0 : square), norm = root / (2 * gain);
    return norm <= p.eps ? 0.f : 2 / root + 0.f * norm;
  }

  SRPKD_DEVICE void store(int row, float ss, float st, float tt) const {
    const float alpha_s = alpha_of(ss, gain_s), alpha_t = alpha_of(tt, gain_t);
    const bool inside = of.pixel + row < p.pixels;
    if (inside) {
      const int64_t at = int64_t{of.image} * p.pixels + of.pixel + row;
      store_global(p.alpha[STUDENT] + at, alpha_s), store_global(p.alpha[TEACHER] + at, alpha_t);
      store_global(p.distances + at, 0.25f * alpha_s * (product(alpha_s, ss) + product(alpha_t, st)));
    }
    const double a = alpha_s, b = alpha_t;
    if (!p.difference)
      store_shared(of.shared + row * 8, inside ? 0.25 * (a * (a * ss + 2 * b * st) + b * b * tt) : 0.0);
  }
};

// The second stage. Grid: (images * tiles, splits). The last block of a group of tiles adds their partial sums, and
// computes the factors and, in the difference form, the group's part of the loss. In the direct form a group is one
// tile. In the difference form it has the tiles of all moments at a place and at its mirror image.
template <class T, bool PIXELS_ADJACENT, bool DIFFERENCE>
struct ScaledMoments {
  using Arguments = closed_form::Arguments;
  using Sum = Moments<T, PIXELS_ADJACENT, DIFFERENCE>;
  static constexpr int THREADS = Sum::THREADS, MIN_BLOCKS = Sum::MIN_BLOCKS, SHARED_BYTES = Sum::SHARED_BYTES;
  using Finish = FinishTiles<THREADS, true, BFloat16, 8>;  // three blocks have no registers for more
  // Two buffers follow the first word, which other threads may still read.
  static constexpr int BUFFERS_AT = 256, BUFFER_BYTES = Finish::Strip::BYTES;
  static_assert(BUFFERS_AT + 2 * BUFFER_BYTES <= SHARED_BYTES);

  const Arguments& p;
  const BlockIndex own_block;

  SRPKD_DEVICE ScaledMoments(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  SRPKD_DEVICE void run() const {
    Sum(p, own_block).run();
    const int index = own_block.x % p.tiles.count(), image = own_block.x / p.tiles.count();
    const TileOfMoments at = tile_at(p.tiles, index);
    const int row = minimum(at.row, at.column), column = at.row + at.column - row;
    const int group = DIFFERENCE ? p.tiles.index(AA, row, column) : index;
    const int tiles = !DIFFERENCE ? 1 : row == column ? p.tiles.moments : p.tiles.moments + 1;
    if (!algebra::is_last_block(p.counters + image * p.groups + group, tiles * p.ranges.splits, shared_memory()))
      return;
    const Finish finish{p, image};
    if constexpr (DIFFERENCE) {
      double loss = finish.sum_rows_of_differences(row, column, 0, BLOCK);
      if (row != column) loss += finish.sum_rows_of_differences(column, row, 0, BLOCK);
      sync_block();
      loss = sum_of_threads<THREADS>(loss, shared_memory());
      if (thread_index() == 0) store_global(p.losses + int64_t{image} * p.groups + group, loss);
    } else {
#pragma unroll 1
      for (int strip = 0; strip < STRIPS; ++strip)  // each buffer is free again after the next barrier
        finish.sum_strip(at, strip * STRIP, shared_memory() + BUFFERS_AT + strip % 2 * BUFFER_BYTES);
    }
  }
};

}  // namespace srpkd::cuda::closed_form
