// Partial sums of the moments, and their sum: the partial losses and the factors of the gradient. Free of torch.
#pragma once

#include "../algebra/moments.cuh"
#include "arguments.h"

namespace srpkd::cuda::closed_form {

using algebra::add_product;
using algebra::MATRIX_UNIT;
using algebra::move_sums;
using algebra::PANEL_BYTES;
using algebra::PanelPart;
using algebra::Pixels;
using algebra::store_matrix_terms;
using algebra::STRIP;
using algebra::STRIPS;
using algebra::sum_of_threads;

// The terms of products: bfloat16, or float16 where the size of scaled features is known. Those have 11 bits instead of
// 8: features of 16 bits are one term, and a matrix has two instead of three.
template <class T, class Term>
constexpr int FEATURE_TERMS = !std::is_same_v<Term, Half> ? algebra::TERMS<T>
                              : sizeof(T) == 4            ? 2
                                                          : 1;

// A scaled feature z = alpha q is at most 1. For float16 terms, alpha = mantissa x power of two: the features times
// the power are exact, except for digits below 2^-39 of the pixel's norm.
SRPKD_DEVICE float power_of_two_of(float alpha) { return as_float(as_bits(alpha) & 0x7f800000u); }
SRPKD_DEVICE float mantissa_of(float alpha) {  // 0 for 0, NaN for NaN
  return alpha * as_float((254u << 23) - (as_bits(alpha) & 0x7f800000u));
}
constexpr float LARGEST_TERM = 0x1p15f;  // to which a scaled feature of 1 is scaled

SRPKD_DEVICE int64_t offset_of_partial(const Arguments& p, int image, int tile) {
  return algebra::offset_of_partial(image, p.tiles.count(), tile, p.ranges.splits, 0);
}

// Grid: (images * tiles, splits). A block computes one tile of one moment over one range of pixels.
//
// In the direct form the left factor is the features themselves, which have few terms, and the right factor is the
// features times both scales, in all terms. In the difference form both factors are sums of scaled features, in all
// terms. In the first stage of "row", the gain takes the place of the scales. In the second, the direct form computes
// W_ss - W_d in place of W_ss. For float16 terms, the left features are multiplied by a power of two, and the right
// ones by what remains of the scales.
//
// The panels of 16-bit features are loaded one step ahead, and the scales of their pixels two.
template <class T, bool PIXELS_ADJACENT, bool DIFFERENCE, class Term = BFloat16>
struct Moments {
  using Arguments = closed_form::Arguments;
  using Tile = algebra::MomentTile<T, PIXELS_ADJACENT>;
  using G = typename Tile::G;
  using Part = PanelPart<T, PIXELS_ADJACENT>;
  using Combined = PanelPart<float, PIXELS_ADJACENT>;
  static constexpr bool HALF = std::is_same_v<Term, Half>, LOADS_AHEAD = sizeof(T) == 2;
  static constexpr int THREADS = Tile::THREADS, MIN_BLOCKS = LOADS_AHEAD && !DIFFERENCE ? 3 : 2;
  static constexpr int RIGHT_TERMS = algebra::TERMS_OF_MATRIX<Term>;
  static constexpr int LEFT_TERMS = DIFFERENCE ? RIGHT_TERMS : FEATURE_TERMS<T, Term>;
  static constexpr int RIGHT_AT = LEFT_TERMS * PANEL_BYTES, STAGE_BYTES = RIGHT_AT + RIGHT_TERMS * PANEL_BYTES;
  static constexpr int STAGES = STAGE_BYTES <= 4 * PANEL_BYTES ? 2 : 1, SCALES_AT = STAGES * STAGE_BYTES;
  static constexpr int SHARED_BYTES = SCALES_AT + 2 * 2 * BLOCK * 4;
  // The product of one pixel's terms, if both scaled features are 1. f and e are at most 2.
  static constexpr float UNIT_OF_SUM = HALF ? LARGEST_TERM / 2 : 1.f;
  static constexpr float UNIT = !HALF ? 1.f : DIFFERENCE ? UNIT_OF_SUM * UNIT_OF_SUM : LARGEST_TERM * LARGEST_TERM / 2;
  static constexpr float LARGEST_GAIN = 0x1p60f;

  const Arguments& p;
  const BlockIndex own_block;
  const Tile tile{};
  const Address shared = shared_memory();
  const int index = own_block.x % p.tiles.count(), image = own_block.x / p.tiles.count(), split = own_block.y;
  const TileOfMoments at = tile_at(p.tiles, index);
  // of the direct form
  const int network_of_row = at.moment == BB ? TEACHER : STUDENT,
            network_of_column = at.moment == AA ? STUDENT : TEACHER;
  float gain[2];
  Part part[2][DIFFERENCE ? 2 : 1];  // of rows and columns; in the difference form of both networks

  SRPKD_DEVICE Moments(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  // Computes the gains from 64 pixels and the first 64 channels. Equal in all blocks of an image.
  SRPKD_DEVICE void choose_gains() {
#pragma unroll
    for (int network = 0; network < 2; ++network) {
      Part sample;
      sample.load(p.features[network], image, algebra::sample_of(p.pixels), 0);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Part::COUNT; ++i)
#pragma unroll
        for (int e = 0; e < Part::UNIT; ++e) sum += fabsf(sample.raw[i][e]);
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
    const int side = thread_index() / BLOCK, place = thread_index() % BLOCK;  // of this thread's scale
    algebra::Sums<G> total{}, sum{};
    int step = 0;
    if constexpr (LOADS_AHEAD) load({first, end}, 0), load({first, end}, 1);
    store_shared(scale_at(0, side, place), scale_of(side, first + place, end));
    float scale = scale_of(side, first + BLOCK + place, end);
    sync_block();
#pragma unroll 1
    for (int pixel = first; pixel < end; pixel += BLOCK, ++step) {
      if constexpr (STAGES == 1) sync_block();  // the panels are free
      const Address left = shared + (STAGES == 2 ? step % 2 * STAGE_BYTES : 0), right = left + RIGHT_AT;
      if constexpr (!LOADS_AHEAD) load({pixel, end}, 0);
      store<LEFT_TERMS>(0, step, left);
      if constexpr (!LOADS_AHEAD) load({pixel, end}, 1);
      store<RIGHT_TERMS>(1, step, right);
      store_shared(scale_at(step + 1, side, place), scale);
      sync_block();  // the panels have arrived
      if (pixel + BLOCK < end) {
        if constexpr (LOADS_AHEAD) load({pixel + BLOCK, end}, 0), load({pixel + BLOCK, end}, 1);
        scale = scale_of(side, pixel + 2 * BLOCK + place, end);
      }
      add_product<G, PIXELS_ADJACENT, PIXELS_ADJACENT, LEFT_TERMS, RIGHT_TERMS, Term>(
          sum, left + tile.left_offset(), PANEL_BYTES, right + tile.right_offset(), PANEL_BYTES);
      move_sums<G>(total, sum);
    }
    float* const partial = p.partial + offset_of_partial(p, image, index) + int64_t{split} * BLOCK * BLOCK;
    tile.for_each_element([&](int row, int column, int m, int n, int i) {
      store_global(partial + row * BLOCK + column, total[m][n][i] * (1 / UNIT));
    });
  }

  SRPKD_DEVICE Address scale_at(int step, int side, int pixel) const {
    return shared + SCALES_AT + ((step % 2 * 2 + side) * BLOCK + pixel) * 4;
  }

  SRPKD_DEVICE float alpha_of(int network, int pixel) const {
    if (p.stage == Stage::first) return network == STUDENT ? gain[STUDENT] : gain[TEACHER];
    return p.alpha[network] ? load_global(p.alpha[network] + int64_t{image} * p.pixels + pixel) : 1.f;
  }
  SRPKD_DEVICE float distance_of(int pixel) const {
    return load_global(p.distances + int64_t{image} * p.pixels + pixel);
  }

  // The scale of a pixel in the panel of the rows (side 0) or of the columns; in the difference form of one network, or
  // for W_d the scale and the distance. 0 beyond the last pixel.
  SRPKD_DEVICE float scale_of(int side, int pixel, int end) const {
    if (pixel >= end) return 0;
    if constexpr (DIFFERENCE) {
      if (at.moment == OF_DISTANCES && side == TEACHER) return distance_of(pixel);
      return alpha_of(side, pixel) * UNIT_OF_SUM;
    } else {
      const float of_row = alpha_of(network_of_row, pixel);
      if (side == 0) return HALF ? power_of_two_of(of_row) * LARGEST_TERM : 1.f;
      float weight = (HALF ? mantissa_of(of_row) * (LARGEST_TERM / 2) : of_row) * alpha_of(network_of_column, pixel);
      if (p.stage == Stage::second && at.moment == AA) weight *= 1 - distance_of(pixel);
      return weight;
    }
  }

  SRPKD_DEVICE void load(const Pixels& pixels, int side) {
    const int channel = (side == 0 ? at.row : at.column) * BLOCK;
    if constexpr (DIFFERENCE) {
      part[side][STUDENT].load(p.features[STUDENT], image, pixels, channel);
      if (at.moment != OF_DISTANCES) part[side][TEACHER].load(p.features[TEACHER], image, pixels, channel);
    } else {
      part[side][0].load(p.features[side == 0 ? network_of_row : network_of_column], image, pixels, channel);
    }
  }

  // One of the scales of this thread's elements of a panel.
  struct Scales {
    float value[PIXELS_ADJACENT ? Part::UNIT : Part::COUNT];
    SRPKD_DEVICE float operator()(int i, int e) const { return value[PIXELS_ADJACENT ? e : i]; }
  };
  SRPKD_DEVICE Scales scales_of(int step, int side) const {
    Scales scales;
    const Part& own = part[0][0];
    if constexpr (PIXELS_ADJACENT) {
#pragma unroll
      for (int e = 0; e < Part::UNIT; e += 4) {
        const auto words = load_shared<sm80::Words>(scale_at(step, side, own.pixel(0, e)));
#pragma unroll
        for (int j = 0; j < 4; ++j) scales.value[e + j] = as_float(words.word[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < Part::COUNT; ++i) scales.value[i] = load_shared<float>(scale_at(step, side, own.pixel(i, 0)));
    }
    return scales;
  }

  // Writes the panel of the rows or of the columns.
  template <int TERMS>
  SRPKD_DEVICE void store(int side, int step, Address to) const {
    if constexpr (DIFFERENCE) {
      const Scales first = scales_of(step, STUDENT), second = scales_of(step, TEACHER);
      const Part &student = part[side][STUDENT], &teacher = part[side][TEACHER];
      if (at.moment == OF_DISTANCES)
        return store_terms<TERMS>(to, [&](int i, int e) {
          const float z = student.raw[i][e] * first(i, e);
          return side == 0 ? z : z * second(i, e);
        });
      // f or e. The products are rounded: if both are equal, their difference is exactly 0.
      const float sign = side == 0 ? (at.moment == BB ? -1.f : 1.f) : (at.moment == AA ? 1.f : -1.f);
      store_terms<TERMS>(to, [&](int i, int e) {
        return product(student.raw[i][e], first(i, e)) + sign * product(teacher.raw[i][e], second(i, e));
      });
    } else if (!HALF && side == 0) {
      part[0][0].template store<G>(to, PANEL_BYTES);
    } else {
      const Scales scales = scales_of(step, side);
      store_terms<TERMS>(to, [&](int i, int e) { return part[side][0].raw[i][e] * scales(i, e); });
    }
  }

  // Writes value(i, e) in terms.
  template <int TERMS, class F>
  SRPKD_DEVICE void store_terms(Address to, F value) const {
    Combined panel;
#pragma unroll
    for (int i = 0; i < Part::COUNT; ++i)
#pragma unroll
      for (int e = 0; e < Part::UNIT; ++e) panel.raw[i].word[e] = as_bits(value(i, e));
    panel.template store<TERMS, G, Term>(to, PANEL_BYTES, [](float x, int, int) { return x; });
  }
};

// Adds the partial sums of strips of moments, and computes what follows from them. COHERENT: other blocks of this
// launch have written the partial sums since the last barrier of the grid. BATCH: ranges whose partial sums are loaded
// together.
template <int THREADS, bool COHERENT, class Term, int BATCH>
struct FinishTiles {
  using Strip = algebra::StripOfMatrix<THREADS, Term>;

  const Arguments& p;
  const int image;

  // The tile that stores an element of a moment, and the element's place there. Of symmetric moments, only tiles on and
  // above the diagonal are stored.
  struct Place {
    int tile, offset;
  };
  SRPKD_DEVICE Place place_of(Moment moment, int block_row, int block_column, int row, int column) const {
    const bool mirrored = moment != AB && block_row > block_column;
    return {mirrored ? p.tiles.index(moment, block_column, block_row) : p.tiles.index(moment, block_row, block_column),
            mirrored ? column * BLOCK + row : row * BLOCK + column};
  }

  SRPKD_DEVICE double element(Moment moment, int block_row, int block_column, int row, int column) const {
    const Place at = place_of(moment, block_row, block_column, row, column);
    const float* const partial = p.partial + offset_of_partial(p, image, at.tile) + at.offset;
    return algebra::sum_in_order(p.ranges.splits, [&](int split) {
      const float* const from = partial + split * BLOCK * BLOCK;
      return COHERENT ? load_global_coherent(from) : load_global(from);
    });
  }

  // The place of an element of S, which are as large as one split of the moments AA, AB and BB.
  SRPKD_DEVICE float* sum_at(Moment moment, int block_row, int block_column, int row, int column) const {
    const Place at = place_of(moment, block_row, block_column, row, column);
    return p.sums + (int64_t{image} * p.tiles.first(OF_DISTANCES) + at.tile) * BLOCK * BLOCK + at.offset;
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

  // Writes the factors of a strip of a tile in the direct form, and returns this thread's part of the loss of "cosine"
  // and "none". The buffer has Strip::BYTES. Contains one barrier, before the last use of the buffer.
  SRPKD_DEVICE double sum_strip(const TileOfMoments& at, int first_row, Address buffer) const {
    const bool is_teacher = at.moment == BB, symmetric = at.moment != AB;
    uint16_t* const matrix = is_teacher ? p.stage == Stage::first ? p.teacher_factor : nullptr
                                        : p.factors[at.moment == AA ? STUDENT : TEACHER];
    const int rows = is_teacher ? p.tiles.blocks_b : p.tiles.blocks_a;
    const int columns = at.moment == AA ? p.tiles.blocks_a : p.tiles.blocks_b;
    const bool mirrored = matrix && symmetric && at.row != at.column;
    uint16_t* const of_image = matrix ? matrix + image * elements_of_factor(rows, columns) : nullptr;
    const Strip strip{of_image, {at.row, at.column}, columns, first_row, mirrored, buffer};
    const double factor = (symmetric ? 4 : -4) * double{p.factor_scale};
    double squares = 0;
    const float* const partial = p.partial + offset_of_partial(p, image, p.tiles.index(at.moment, at.row, at.column));
    algebra::StripOfPartials<THREADS, algebra::MAX_SPLITS, BATCH> partials(partial, p.ranges.splits, first_row);
    partials.for_each_sum([&](int row, int column, const double (&sums)[MATRIX_UNIT]) {
      float x[MATRIX_UNIT];
#pragma unroll
      for (int e = 0; e < MATRIX_UNIT; ++e) {
        squares += sums[e] * sums[e];
        x[e] = static_cast<float>(factor * sums[e]);
      }
      if (matrix) strip.store(row, column, x);
    });
    sync_block();
    strip.store_mirrored();
    return squares * (at.moment == AB ? -2 : at.row == at.column ? 1 : 2);
  }

  // Writes the factors of some rows of a tile in the difference form, and returns this thread's part of the loss.
  SRPKD_DEVICE double sum_rows_of_differences(int block_row, int block_column, int first_row, int rows) const {
    double loss = 0;
    for (int i = first_row * BLOCK + thread_index() * 2; i < (first_row + rows) * BLOCK; i += THREADS * 2) {
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
        const double scale = p.factor_scale;
        student[j] = static_cast<float>(scale * (ff + fe + ef + ee - 4 * of_distances));  // 4 M_ss, or 4 (W_ss - W_d)
        teacher[j] = static_cast<float>(scale * (fe + ee - ff - ef));                     // -4 M_st
        teacher_alone[j] = static_cast<float>(scale * (ff + ee - fe - ef));               // 4 M_tt
        if (p.stage != Stage::first) continue;
        store_global(sum_at(AB, block_row, block_column, row, column + j), static_cast<float>(fe));
        if (block_row > block_column) continue;
        store_global(sum_at(AA, block_row, block_column, row, column + j), static_cast<float>(ff));
        store_global(sum_at(BB, block_row, block_column, row, column + j), static_cast<float>(ee));
      }
      if (!p.factors[STUDENT]) continue;
      store_matrix_terms<Term>(factor_at(STUDENT, block_row, block_column, row, column), student);
      store_matrix_terms<Term>(factor_at(TEACHER, block_row, block_column, row, column), teacher);
      if (p.stage == Stage::first)
        store_matrix_terms<Term>(teacher_factor_at(block_row, block_column, row, column), teacher_alone);
    }
    return loss;
  }
};

// Grid: (images * tiles, strips of a tile). A block adds the partial sums of a strip, and computes its part of the
// factors and, for "cosine" and "none", of the loss. In the difference form the blocks of M_ab do that for all moments,
// and the others only count ties.
template <class Term, int THREADS_>
struct SumMoments {
  using Arguments = closed_form::Arguments;
  static constexpr int THREADS = THREADS_, MIN_BLOCKS = 2;
  using Finish = FinishTiles<THREADS, false, Term, algebra::MAX_SPLITS>;
  static constexpr int SUMS_AT = Finish::Strip::BYTES, SHARED_BYTES = SUMS_AT + THREADS / 32 * 8;

  const Arguments& p;
  const BlockIndex own_block;
  const int index = own_block.x % p.tiles.count(), image = own_block.x / p.tiles.count();
  const int strips = p.tiles.count() * STRIPS, strip = index * STRIPS + own_block.y;  // of the image
  const TileOfMoments at = tile_at(p.tiles, index);

  SRPKD_DEVICE SumMoments(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  SRPKD_DEVICE void run() const {
    const Finish finish{p, image};
    const int first_row = own_block.y * STRIP;
    double loss = 0;
    if (!p.difference)
      loss = finish.sum_strip(at, first_row, shared_memory());
    else if (at.moment == AB)
      loss = finish.sum_rows_of_differences(at.row, at.column, first_row, STRIP);
    if (p.stage == Stage::first) {
      if (p.counters)
        for (int i = strip * THREADS + thread_index(); i < p.groups; i += strips * THREADS)
          store_global(p.counters + image * p.groups + i, 0);
      return;
    }
    if (p.alpha[STUDENT]) loss -= static_cast<double>(count_ties());
    loss = sum_of_threads<THREADS>(loss, shared_memory() + SUMS_AT);
    if (thread_index() == 0) store_global(p.losses + int64_t{image} * strips + strip, loss);
  }

  // D_ii counts as 0, but the moments include 1 where only one of student and teacher has norm 0 at pixel i.
  SRPKD_DEVICE int count_ties() const {
    int ties = 0;
    const int64_t of_image = int64_t{image} * p.pixels;
    for (int pixel = strip * THREADS + thread_index(); pixel < p.pixels; pixel += strips * THREADS)
      ties += (load_global(p.alpha[STUDENT] + of_image + pixel) != 0) !=
              (load_global(p.alpha[TEACHER] + of_image + pixel) != 0);
    return ties;
  }
};

}  // namespace srpkd::cuda::closed_form
