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
// sums of scaled features, in three terms. In the first stage of "row", the gain takes the place of the scales. In the
// second, the direct form computes W_ss - W_d in place of W_ss.
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
  static constexpr float LARGEST_GAIN = 0x1p60f;

  const Arguments& p;
  const Tile tile{};
  const Address shared = shared_memory();
  const int index = block_index(0) % p.tiles.count(), image = block_index(0) / p.tiles.count(), split = block_index(1);
  const TileOfMoments at = tile_at(p.tiles, index);
  // of the direct form
  const int network_of_row = at.moment == BB ? TEACHER : STUDENT,
            network_of_column = at.moment == AA ? STUDENT : TEACHER;
  float gain[2];

  SRPKD_DEVICE explicit Moments(const Arguments& arguments) : p(arguments) {}

  SRPKD_DEVICE float alpha_of(int network, int pixel, int end) const {
    if (pixel >= end) return 0;
    if (p.stage == Stage::first) return network == STUDENT ? gain[STUDENT] : gain[TEACHER];
    return p.alpha[network] ? load_global(p.alpha[network] + int64_t{image} * p.pixels + pixel) : 1.f;
  }

  SRPKD_DEVICE float distance_of(int pixel, int end) const {
    return pixel < end ? load_global(p.distances + int64_t{image} * p.pixels + pixel) : 0.f;
  }

  // Computes the gains from 64 pixels and the first 64 channels. Equal in all blocks of an image.
  SRPKD_DEVICE void choose_gains() {
#pragma unroll
    for (int network = 0; network < 2; ++network) {
      Part part;
      part.load(p.features[network], image, algebra::sample_of(p.pixels), 0);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Part::COUNT; ++i)
#pragma unroll
        for (int e = 0; e < Part::UNIT; ++e) sum += fabsf(part.raw[i][e]);
      for (int lanes = 1; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);
      if (thread_index() % 32 == 0) store_shared(shared + (network * THREADS + thread_index()) / 32 * 4, sum);
    }
    sync_block();
#pragma unroll
    for (int network = 0; network < 2; ++network) {
      float sum = 0;
      for (int warp = 0; warp < THREADS / 32; ++warp)
        sum += load_shared<float>(shared + (network * THREADS / 32 + warp) * 4);
      const int count = minimum(p.pixels, BLOCK) * minimum(p.features[network].channels, BLOCK);
      const float inverse = static_cast<float>(count) / sum;
      // NaN if the sum is NaN or overflows
      gain[network] = sum == 0 ? 1.f : (inverse > LARGEST_GAIN ? LARGEST_GAIN : inverse) + 0.f * sum;
      if (index == 0 && split == 0 && thread_index() == 0) store_global(p.gains[network] + image, gain[network]);
    }
    sync_block();  // the panels are free
  }

  SRPKD_DEVICE void run() {
    if (p.stage == Stage::first) choose_gains();
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
      float weight = alpha_of(network_of_row, pixel, pixels.end) * alpha_of(network_of_column, pixel, pixels.end);
      if (p.stage == Stage::second && at.moment == AA) weight *= 1 - distance_of(pixel, pixels.end);
      store_shared(alpha_at(0, thread_index()), weight);
    }
    rows.template store<G>(shared, PANEL_BYTES);
    sync_block();
    columns.template store<MATRIX_TERMS, G>(shared + RIGHT_AT, PANEL_BYTES, [&](float x, int pixel, int) {
      return x * load_shared<float>(alpha_at(0, pixel));
    });
  }

  // The panels of the difference form. alpha_at(network, ..) has the scales, or for W_d distance and scale.
  SRPKD_DEVICE void store_sums(const Pixels& pixels) const {
    sync_block();  // the panels are free
    const int network = thread_index() / BLOCK, place = thread_index() % BLOCK;
    const int pixel = pixels.first + place;
    if (at.moment == OF_DISTANCES) {
      store_shared(alpha_at(network, place),
                   network == STUDENT ? alpha_of(network, pixel, pixels.end) : distance_of(pixel, pixels.end));
      sync_block();
      store_student(pixels, at.row, false, shared);
      return store_student(pixels, at.column, true, shared + RIGHT_AT);
    }
    store_shared(alpha_at(network, place), alpha_of(network, pixel, pixels.end));
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

  // Writes z, or d z.
  SRPKD_DEVICE void store_student(const Pixels& pixels, int block, bool by_distance, Address to) const {
    Part student;
    student.load(p.features[STUDENT], image, pixels, block * BLOCK);
    student.template store<MATRIX_TERMS, G>(to, PANEL_BYTES, [&](float x, int pixel, int) {
      const float z = x * load_shared<float>(alpha_at(STUDENT, pixel));
      return by_distance ? z * load_shared<float>(alpha_at(TEACHER, pixel)) : z;
    });
  }
};

// Adds the partial sums of moments, and computes what follows from them. COHERENT: other blocks of this
// launch have written the partial sums.
template <int THREADS, bool COHERENT>
struct FinishTiles {
  const Arguments& p;
  const int image;

  // Returns an element of a moment. Of symmetric moments, only tiles on and above the diagonal are stored.
  SRPKD_DEVICE double element(Moment moment, int block_row, int block_column, int row, int column) const {
    const bool mirrored = moment != AB && block_row > block_column;
    const int tile =
        mirrored ? p.tiles.index(moment, block_column, block_row) : p.tiles.index(moment, block_row, block_column);
    const float* const partial =
        p.partial + offset_of_partial(p, image, tile) + (mirrored ? column * BLOCK + row : row * BLOCK + column);
    return algebra::sum_in_order(p.ranges.splits, [&](int split) {
      const float* const from = partial + split * BLOCK * BLOCK;
      return COHERENT ? load_global_coherent(from) : load_global(from);
    });
  }

  // The place of an element of S, which are as large as one split of the moments AA, AB and BB.
  SRPKD_DEVICE float* sum_at(Moment moment, int block_row, int block_column, int row, int column) const {
    const bool mirrored = moment != AB && block_row > block_column;
    const int tile =
        mirrored ? p.tiles.index(moment, block_column, block_row) : p.tiles.index(moment, block_row, block_column);
    return p.sums + (int64_t{image} * p.tiles.first(OF_DISTANCES) + tile) * BLOCK * BLOCK +
           (mirrored ? column * BLOCK + row : row * BLOCK + column);
  }

  // The place of an element of a factor with `blocks` columns of panels.
  SRPKD_DEVICE uint16_t* factor_at(uint16_t* factor, int block_rows, int block_columns, int block_row, int block_column,
                                   int row, int column) const {
    return factor + image * elements_of_factor(block_rows, block_columns) +
           algebra::panel_of_terms(block_row, block_column, block_columns) + row * BLOCK + column;
  }
  SRPKD_DEVICE uint16_t* factor_at(int network, int block_row, int block_column, int row, int column) const {
    return factor_at(p.factors[network], p.tiles.blocks_a, network == STUDENT ? p.tiles.blocks_a : p.tiles.blocks_b,
                     block_row, block_column, row, column);
  }
  SRPKD_DEVICE uint16_t* teacher_factor_at(int block_row, int block_column, int row, int column) const {
    return factor_at(p.teacher_factor, p.tiles.blocks_b, p.tiles.blocks_b, block_row, block_column, row, column);
  }

  // Writes the factors of one tile in the direct form, and returns this thread's part of the loss of "cosine" and
  // "none".
  SRPKD_DEVICE double sum_tile(const TileOfMoments& at) const {
    double squares = 0;
    for (int i = thread_index() * 2; i < BLOCK * BLOCK; i += THREADS * 2) {
      const int row = i / BLOCK, column = i % BLOCK;
      const double first = element(at.moment, at.row, at.column, row, column);
      const double second = element(at.moment, at.row, at.column, row, column + 1);
      squares += first * first + second * second;
      const bool is_teacher = at.moment == BB;
      if (is_teacher ? p.stage != Stage::first : !p.factors[STUDENT]) continue;
      const auto to = [&](int block_row, int block_column, int r, int c) {
        return is_teacher ? teacher_factor_at(block_row, block_column, r, c)
                          : factor_at(at.moment == AA ? STUDENT : TEACHER, block_row, block_column, r, c);
      };
      const double factor = at.moment == AB ? -4 : 4;
      const auto one = static_cast<float>(factor * first), other = static_cast<float>(factor * second);
      algebra::store_matrix_terms(to(at.row, at.column, row, column), one, other);
      if (at.moment != AB && at.row != at.column) {
        algebra::store_matrix_terms(to(at.column, at.row, column, row), one);
        algebra::store_matrix_terms(to(at.column, at.row, column + 1, row), other);
      }
    }
    return squares * (at.moment == AB ? -2 : at.row == at.column ? 1 : 2);
  }

  // Writes the factors of one tile in the difference form, and returns this thread's part of the loss.
  SRPKD_DEVICE double sum_tiles_of_differences(int block_row, int block_column) const {
    double loss = 0;
    for (int i = thread_index() * 2; i < BLOCK * BLOCK; i += THREADS * 2) {
      const int row = i / BLOCK, column = i % BLOCK;
      float student[2], teacher[2], teacher_alone[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const double ff = element(AA, block_row, block_column, row, column + j);
        const double ee = element(BB, block_row, block_column, row, column + j);
        const double fe = element(AB, block_row, block_column, row, column + j);
        const double ef = element(AB, block_column, block_row, column + j, row);
        double of_distances = 0;
        if (p.stage == Stage::second) {
          const auto raw = [&](Moment moment, bool transposed) -> double {
            return load_global(transposed ? sum_at(moment, block_column, block_row, column + j, row)
                                          : sum_at(moment, block_row, block_column, row, column + j));
          };
          loss += 0.25 * (ff * raw(BB, false) + ee * raw(AA, false) + 2 * fe * raw(AB, true));
          if (p.factors[STUDENT]) of_distances = element(OF_DISTANCES, block_row, block_column, row, column + j);
        } else {
          loss += 0.5 * (ff * ee + fe * ef);
        }
        student[j] = static_cast<float>(ff + fe + ef + ee - 4 * of_distances);  // 4 M_ss, or 4 (W_ss - W_d)
        teacher[j] = static_cast<float>(fe + ee - ff - ef);                     // -4 M_st
        teacher_alone[j] = static_cast<float>(ff + ee - fe - ef);               // 4 M_tt
        if (p.stage != Stage::first) continue;
        store_global(sum_at(AB, block_row, block_column, row, column + j), static_cast<float>(fe));
        if (block_row > block_column) continue;
        store_global(sum_at(AA, block_row, block_column, row, column + j), static_cast<float>(ff));
        store_global(sum_at(BB, block_row, block_column, row, column + j), static_cast<float>(ee));
      }
      if (!p.factors[STUDENT]) continue;
      algebra::store_matrix_terms(factor_at(STUDENT, block_row, block_column, row, column), student[0], student[1]);
      algebra::store_matrix_terms(factor_at(TEACHER, block_row, block_column, row, column), teacher[0], teacher[1]);
      if (p.stage == Stage::first)
        algebra::store_matrix_terms(teacher_factor_at(block_row, block_column, row, column), teacher_alone[0],
                                    teacher_alone[1]);
    }
    return loss;
  }
};

// Returns the sum over the threads of a block, in thread 0.
template <int THREADS>
SRPKD_DEVICE double sum_of_threads(double value, Address shared) {
  store_shared(shared + thread_index() * 8, value);
  sync_block();
  if (thread_index() == 0)
    for (int i = 1; i < THREADS; ++i) value += load_shared<double>(shared + i * 8);
  return value;
}

// Grid: (images * tiles, 1). A block adds the partial sums of one tile, and computes its part of the factors and, for
// "cosine" and "none", of the loss. In the difference form the blocks of M_ab do that for all moments, and the others
// only count ties.
struct SumMoments {
  using Arguments = closed_form::Arguments;
  static constexpr int THREADS = 256, MIN_BLOCKS = 2, SHARED_BYTES = THREADS * 8;

  const Arguments& p;
  const int index = block_index(0) % p.tiles.count(), image = block_index(0) / p.tiles.count();
  const TileOfMoments at = tile_at(p.tiles, index);

  SRPKD_DEVICE explicit SumMoments(const Arguments& arguments) : p(arguments) {}

  SRPKD_DEVICE void run() const {
    const FinishTiles<THREADS, false> finish{p, image};
    double loss = 0;
    if (!p.difference)
      loss = finish.sum_tile(at);
    else if (at.moment == AB)
      loss = finish.sum_tiles_of_differences(at.row, at.column);
    if (p.stage == Stage::first) {
      if (p.counters)
        for (int i = index * THREADS + thread_index(); i < p.groups; i += p.tiles.count() * THREADS)
          store_global(p.counters + image * p.groups + i, 0);
      return;
    }
    if (p.alpha[STUDENT]) loss -= static_cast<double>(count_ties());
    loss = sum_of_threads<THREADS>(loss, shared_memory());
    if (thread_index() == 0) store_global(p.losses + block_index(0), loss);
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
};

}  // namespace srpkd::cuda::closed_form
