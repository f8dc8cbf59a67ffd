// Partial sums of the moments, and their sum: the partial losses and the factors of the gradient. Free of torch.
#pragma once

#include "../algebra/moments.cuh"
#include "arguments.h"

namespace srpkd::cuda::closed_form {

using algebra::add_product;
using algebra::move_sums;
using algebra::PANEL_BYTES;
using algebra::PanelPart;
using algebra::Pixels;

SRPKD_DEVICE int64_t offset_of_partial(const Arguments& p, int image, int tile) {
  return algebra::offset_of_partial(image, p.tiles.count(), tile, p.ranges.splits, 0);
}

// Grid: (images * tiles, splits). A block computes one tile of one moment over one range of pixels.
//
// In the direct form the left factor is the features themselves, in one exact bfloat16 term or two if they have 16
// bits, and the right factor is the features times both scales, in three terms. In the difference form both factors are
// sums of scaled features, in three terms.
template <class T, bool PIXELS_ADJACENT, bool DIFFERENCE>
struct Moments {
  using Arguments = closed_form::Arguments;
  using Tile = algebra::MomentTile<T, PIXELS_ADJACENT>;
  using G = typename Tile::G;
  using Part = typename Tile::Part;
  using Combined = PanelPart<float, PIXELS_ADJACENT>;
  static constexpr int THREADS = Tile::THREADS, MIN_BLOCKS = 2;
  static constexpr int LEFT_TERMS = DIFFERENCE ? MATRIX_TERMS : algebra::TERMS<T>, RIGHT_AT = LEFT_TERMS * PANEL_BYTES;
  static constexpr int ALPHA_AT = RIGHT_AT + MATRIX_TERMS * PANEL_BYTES, SHARED_BYTES = ALPHA_AT + 2 * BLOCK * 4;

  const Arguments& p;
  const Tile tile{};
  const Address shared = shared_memory();
  const int index = block_index(0) % p.tiles.count(), image = block_index(0) / p.tiles.count(), split = block_index(1);
  const TileOfMoments at = tile_at(p.tiles, index);
  // of the direct form
  const int network_of_row = at.moment == BB ? TEACHER : STUDENT,
            network_of_column = at.moment == AA ? STUDENT : TEACHER;

  SRPKD_DEVICE explicit Moments(const Arguments& arguments) : p(arguments) {}

  SRPKD_DEVICE float alpha_of(int network, int pixel, int end) const {
    if (pixel >= end) return 0;
    return p.alpha[network] ? load_global(p.alpha[network] + int64_t{image} * p.pixels + pixel) : 1.f;
  }

  SRPKD_DEVICE void run() const {
    const int first = split * p.ranges.split_pixels, end = minimum(first + p.ranges.split_pixels, p.pixels);
    algebra::Sums<G> total{}, sum{};
#pragma unroll 1
    for (int pixel = first; pixel < end; pixel += BLOCK) {
      if constexpr (DIFFERENCE)
        store_sums({pixel, end});
      else
        store_weighted({pixel, end});
      sync_block();
      add_product<G, PIXELS_ADJACENT, PIXELS_ADJACENT, LEFT_TERMS, MATRIX_TERMS>(
          sum, shared + tile.left_offset(), PANEL_BYTES, shared + RIGHT_AT + tile.right_offset(), PANEL_BYTES);
      move_sums<G>(total, sum);
    }
    float* const partial = p.partial + offset_of_partial(p, image, index) + int64_t{split} * BLOCK * BLOCK;
    tile.for_each_element([&](int row, int column, int m, int n, int i) {
      store_global(partial + row * BLOCK + column, total[m][n][i]);
    });
  }

  SRPKD_DEVICE Address alpha_at(int side, int pixel) const { return shared + ALPHA_AT + (side * BLOCK + pixel) * 4; }

  // The panels of the direct form. alpha_at(0, ..) has the product of both scales.
  SRPKD_DEVICE void store_weighted(const Pixels& pixels) const {
    Part rows, columns;
    rows.load(p.features[network_of_row], image, pixels, at.row * BLOCK);
    columns.load(p.features[network_of_column], image, pixels, at.column * BLOCK);
    sync_block();  // the panels are free
    if (thread_index() < BLOCK) {
      const int pixel = pixels.first + thread_index();
      store_shared(alpha_at(0, thread_index()),
                   alpha_of(network_of_row, pixel, pixels.end) * alpha_of(network_of_column, pixel, pixels.end));
    }
    rows.template store<G>(shared, PANEL_BYTES);
    sync_block();
    columns.template store<MATRIX_TERMS, G>(shared + RIGHT_AT, PANEL_BYTES, [&](float x, int pixel, int) {
      return x * load_shared<float>(alpha_at(0, pixel));
    });
  }

  // The panels of the difference form. alpha_at(network, ..) has the scales.
  SRPKD_DEVICE void store_sums(const Pixels& pixels) const {
    sync_block();  // the panels are free
    const int network = thread_index() / BLOCK, place = thread_index() % BLOCK;
    store_shared(alpha_at(network, place), alpha_of(network, pixels.first + place, pixels.end));
    sync_block();
    store_sum(pixels, at.row, at.moment == BB ? -1.f : 1.f, shared);
    store_sum(pixels, at.column, at.moment == AA ? 1.f : -1.f, shared + RIGHT_AT);
  }

  // Writes z + sign * y. The products are rounded: if both are equal, their difference is exactly 0.
  SRPKD_DEVICE void store_sum(const Pixels& pixels, int block, float sign, Address to) const {
    Part student, teacher;
    student.load(p.features[STUDENT], image, pixels, block * BLOCK);
    teacher.load(p.features[TEACHER], image, pixels, block * BLOCK);
    Combined sum;
#pragma unroll
    for (int i = 0; i < Part::COUNT; ++i)
#pragma unroll
      for (int e = 0; e < Part::UNIT; ++e) {
        const int pixel = student.pixel(i, e);
        const float z = product(student.raw[i][e], load_shared<float>(alpha_at(STUDENT, pixel)));
        sum.raw[i].word[e] =
            as_bits(z + sign * product(teacher.raw[i][e], load_shared<float>(alpha_at(TEACHER, pixel))));
      }
    sum.template store<G>(to, PANEL_BYTES);
  }
};

// Grid: (images * tiles, 1). A block adds the partial sums of one tile in double, and computes its part of the loss and
// of the factors. In the difference form the blocks of M_ab do that for all moments, and the others only count ties.
struct SumMoments {
  using Arguments = closed_form::Arguments;
  static constexpr int THREADS = 256, MIN_BLOCKS = 2, SHARED_BYTES = THREADS * 8;

  const Arguments& p;
  const Address shared = shared_memory();
  const int index = block_index(0) % p.tiles.count(), image = block_index(0) / p.tiles.count();
  const TileOfMoments at = tile_at(p.tiles, index);

  SRPKD_DEVICE explicit SumMoments(const Arguments& arguments) : p(arguments) {}

  SRPKD_DEVICE void run() const {
    double loss = 0;
    if (!p.difference)
      loss = sum_tile();
    else if (at.moment == AB)
      loss = sum_tiles_of_differences();
    if (p.alpha[STUDENT]) loss -= static_cast<double>(count_ties());
    store_shared(shared + thread_index() * 8, loss);
    sync_block();
    if (thread_index() != 0) return;
    for (int i = 1; i < THREADS; ++i) loss += load_shared<double>(shared + i * 8);
    store_global(p.losses + block_index(0), loss);
  }

  // D_ii counts as 0, but the moments include 1 where only one of student and teacher has norm 0 at pixel i.
  SRPKD_DEVICE int count_ties() const {
    int ties = 0;
    const int64_t of_image = int64_t{image} * p.pixels;
    for (int pixel = index * THREADS + thread_index(); pixel < p.pixels; pixel += p.tiles.count() * THREADS)
      ties += (load_global(p.alpha[STUDENT] + of_image + pixel) != 0) !=
              (load_global(p.alpha[TEACHER] + of_image + pixel) != 0);
    return ties;
  }

  // Returns an element of a moment. Of symmetric moments, only tiles on and above the diagonal are stored.
  SRPKD_DEVICE double element(Moment moment, int block_row, int block_column, int row, int column) const {
    const bool mirrored = moment != AB && block_row > block_column;
    const int tile =
        mirrored ? p.tiles.index(moment, block_column, block_row) : p.tiles.index(moment, block_row, block_column);
    const float* const partial =
        p.partial + offset_of_partial(p, image, tile) + (mirrored ? column * BLOCK + row : row * BLOCK + column);
    double sum = 0;
    for (int split = 0; split < p.ranges.splits; ++split) sum += load_global(partial + split * BLOCK * BLOCK);
    return sum;
  }

  // The place of an element of a factor.
  SRPKD_DEVICE uint16_t* factor_at(int network, int block_row, int block_column, int row, int column) const {
    const int blocks = network == STUDENT ? p.tiles.blocks_a : p.tiles.blocks_b;
    return p.factors[network] + image * elements_of_factor(p.tiles.blocks_a, blocks) +
           algebra::panel_of_terms(block_row, block_column, blocks) + row * BLOCK + column;
  }

  SRPKD_DEVICE double sum_tile() const {
    double squares = 0;
    for (int i = thread_index() * 2; i < BLOCK * BLOCK; i += THREADS * 2) {
      const int row = i / BLOCK, column = i % BLOCK;
      const double first = element(at.moment, at.row, at.column, row, column);
      const double second = element(at.moment, at.row, at.column, row, column + 1);
      squares += first * first + second * second;
      if (!p.gradient || at.moment == BB) continue;
      const int network = at.moment == AA ? STUDENT : TEACHER;
      const double factor = at.moment == AA ? 4 : -4;
      const auto one = static_cast<float>(factor * first), other = static_cast<float>(factor * second);
      algebra::store_matrix_terms(factor_at(network, at.row, at.column, row, column), one, other);
      if (at.moment == AA && at.row != at.column) {
        algebra::store_matrix_terms(factor_at(network, at.column, at.row, column, row), one);
        algebra::store_matrix_terms(factor_at(network, at.column, at.row, column + 1, row), other);
      }
    }
    return squares * (at.moment == AB ? -2 : at.row == at.column ? 1 : 2);
  }

  SRPKD_DEVICE double sum_tiles_of_differences() const {
    double loss = 0;
    for (int i = thread_index() * 2; i < BLOCK * BLOCK; i += THREADS * 2) {
      const int row = i / BLOCK, column = i % BLOCK;
      float student[2], teacher[2];
      for (int j = 0; j < 2; ++j) {
        const double ff = element(AA, at.row, at.column, row, column + j);
        const double ee = element(BB, at.row, at.column, row, column + j);
        const double fe = element(AB, at.row, at.column, row, column + j);
        const double ef = element(AB, at.column, at.row, column + j, row);
        loss += 0.5 * (ff * ee + fe * ef);
        student[j] = static_cast<float>(ff + fe + ef + ee);  // 4 M_ss
        teacher[j] = static_cast<float>(fe + ee - ff - ef);  // -4 M_st
      }
      if (!p.gradient) continue;
      algebra::store_matrix_terms(factor_at(STUDENT, at.row, at.column, row, column), student[0], student[1]);
      algebra::store_matrix_terms(factor_at(TEACHER, at.row, at.column, row, column), teacher[0], teacher[1]);
    }
    return loss;
  }
};

}  // namespace srpkd::cuda::closed_form
