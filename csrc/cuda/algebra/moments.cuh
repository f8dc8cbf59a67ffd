// Moments over the pixels of an image: M = Q^T Q of both networks, and the student's M_w = Q^T diag(w) Q. Free of
// torch.
//
// A thread block sums one tile of 64 x 64 channels over one range of pixels. A second kernel adds the ranges in a fixed
// order, and splits the result into bfloat16 terms for later products. In calls that fill the GPU, the last block of a
// tile of M_w to arrive does so instead, which saves a launch.
//
// The shift. A row norm is r_i^2 = q_i^T M q_i = q_i^T M' q_i + N (m . q_i)^2 with the mean m and M', the moment of
// q - m. Both terms are non-negative: pixels that do not share a large common mean keep the digits that would cancel in
// the first form. M' is computed in one pass, from sums of q - c with any c near m, chosen from 64 pixels of the image:
// M' = sum (q - c)(q - c)^T - N (m - c)(m - c)^T. 16-bit features have c = 0, and are exact as they are, in channels
// whose mean is less than twice the standard deviation; that subtraction then cancels at most two bits.
#pragma once

#include "matrices.cuh"
#include "sums.cuh"

namespace srpkd::cuda::algebra {

// The product of two panels of channels over a range of pixels, one tile of 64 x 64 channels.
template <class T, bool PIXELS_ADJACENT>
struct MomentTile {
  using G = Geometry<2, PIXELS_ADJACENT>;
  using Part = PanelPart<T, PIXELS_ADJACENT>;
  static constexpr int THREADS = G::THREADS;
  static_assert(THREADS == PANEL_THREADS);

  sm80::Warp<G> warp;

  SRPKD_DEVICE Address left_offset() const {
    return warp.template lane_offset<PIXELS_ADJACENT, true>(warp.first_row, 0);
  }
  SRPKD_DEVICE Address right_offset() const {
    return warp.template lane_offset<PIXELS_ADJACENT, false>(warp.first_column, 0);
  }

  template <class F>
  SRPKD_DEVICE void for_each_element(F f) const {
    for_each<G::M_TILES, G::N_TILES>(
        [&](int m, int n, int i) { f(warp.row(m, i / 2), warp.column(n, i % 2), m, n, i); });
  }
};

// Grid: (images * tiles of both networks, splits).
template <class T, bool PIXELS_ADJACENT>
struct Moments {
  using Arguments = MomentArguments;
  using Tile = MomentTile<T, PIXELS_ADJACENT>;
  using G = typename Tile::G;
  using Part = typename Tile::Part;
  static constexpr int THREADS = Tile::THREADS, MIN_BLOCKS = sizeof(T) == 4 ? 2 : 3;
  static constexpr bool NARROW = sizeof(T) == 2;
  static constexpr int COUNT = NARROW ? 2 : 3;  // terms of q - c
  static constexpr int SHIFT_AT = 2 * COUNT * PANEL_BYTES, SHARED_BYTES = SHIFT_AT + 2 * BLOCK * 4;

  const Arguments& p;
  const BlockIndex own_block;
  const Tile tile{};
  const Address shared = shared_memory();
  const int tiles_t = tiles_of(p.features[TEACHER].channels), tiles = tiles_t + tiles_of(p.features[STUDENT].channels);
  const int index = own_block.x % tiles, image = own_block.x / tiles, split = own_block.y;
  const int network = index < tiles_t ? TEACHER : STUDENT;
  const Features& features = p.features[network];
  const TileOfMoment at = tile_of_moment(index - (network == STUDENT ? tiles_t : 0), blocks_of(features.channels));
  const bool diagonal = at.row == at.column;
  const Address left = shared, right = diagonal ? left : shared + COUNT * PANEL_BYTES, shift = shared + SHIFT_AT;
  Part part[2];

  SRPKD_DEVICE Moments(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  SRPKD_DEVICE void load(const Pixels& pixels) {
    part[0].load(features, image, pixels, at.row * BLOCK);
    if (!diagonal) part[1].load(features, image, pixels, at.column * BLOCK);
  }

  // Chooses c of this tile's rows and columns, and returns whether any is not 0. Equal in all blocks of a channel.
  SRPKD_DEVICE bool choose_shift() {
    load(sample_of(p.pixels));
    part[0].template store<G>(left, PANEL_BYTES);
    if (!diagonal) part[1].template store<G>(right, PANEL_BYTES);
    sync_block();
    const int thread = thread_index(), channel = thread % BLOCK, count = minimum(p.pixels, BLOCK);
    const Address panel = thread < BLOCK ? left : right;
    float mean = 0, square = 0;
    for (int i = 0; i < count; ++i) {
      const float value = element<TERMS<T>, PIXELS_ADJACENT, G>(panel, PANEL_BYTES, i, channel);
      mean += value, square += value * value;
    }
    mean /= static_cast<float>(count);
    if constexpr (NARROW) {
      // mean^2 >= 4 variance; NaN and infinity do not compare
      const bool large = mean != 0 && 5 * mean * mean * static_cast<float>(count) >= 4 * square;
      mean = large ? as_float(pack<BFloat16>(mean, 0) << 16) : 0.f;
    }
    store_shared(shift + thread * 4, mean);
    sync_block();
    bool any = false;
    for (int i = 0; i < 2 * BLOCK; i += 4) {
      const auto words = load_shared<sm80::Words>(shift + i * 4);
      for (int j = 0; j < 4; ++j) any |= words.word[j] << 1 != 0;
    }
    if (split == 0 && diagonal && thread < BLOCK)
      store_global(p.shift + vector_at(0, 1) + at.row * BLOCK + thread, mean);
    return any;
  }

  // The offset of this image's and this network's vector over the channels.
  SRPKD_DEVICE int64_t vector_at(int split_of_vector, int splits) const {
    const int teacher = padded(p.features[TEACHER].channels), both = teacher + padded(p.features[STUDENT].channels);
    return (int64_t{image} * splits + split_of_vector) * both + (network == STUDENT ? teacher : 0);
  }

  SRPKD_DEVICE void store_shifted(const Part& from, Address to, Address shift_of, const Pixels& pixels) const {
    from.template store<COUNT, G>(to, PANEL_BYTES, [&](float x, int pixel, int channel) {
      return Part::pixel_at(pixels, pixel) < pixels.end ? x - load_shared<float>(shift_of + channel * 4) : 0.f;
    });
  }

  SRPKD_DEVICE void run() {
    const bool shifted = choose_shift();
    const int first = split * p.ranges.split_pixels, end = minimum(first + p.ranges.split_pixels, p.pixels);
    Sums<G> total{}, sum{};
    float channel_total[G::M_TILES][2] = {};
    const Address a = left + tile.left_offset(), b = right + tile.right_offset();
    load({first, end});
#pragma unroll 1
    for (int pixel = first; pixel < end; pixel += BLOCK) {
      sync_block();  // the panels are free
      const Pixels pixels{pixel, end};
      if (!NARROW || shifted) {
        store_shifted(part[0], left, shift, pixels);
        if (!diagonal) store_shifted(part[1], right, shift + BLOCK * 4, pixels);
      } else {
        part[0].template store<G>(left, PANEL_BYTES);
        if (!diagonal) part[1].template store<G>(right, PANEL_BYTES);
      }
      sync_block();
      if (pixel + BLOCK < end) load({pixel + BLOCK, end});
      constexpr bool ADJACENT = PIXELS_ADJACENT;
      if (!NARROW || shifted) {
        add_product<G, ADJACENT, ADJACENT, COUNT, COUNT>(sum, a, PANEL_BYTES, b, PANEL_BYTES);
        if (diagonal) add_channels<COUNT>(channel_total, a);
      } else {
        add_product<G, ADJACENT, ADJACENT, TERMS<T>, TERMS<T>>(sum, a, PANEL_BYTES, b, PANEL_BYTES);
        if (diagonal) add_channels<TERMS<T>>(channel_total, a);
      }
      move_sums<G>(total, sum);
    }
    store(total, channel_total);
  }

  // Adds the sums over the pixels of the channels in the rows of this warp: the product with a column of ones.
  template <int COUNT_TERMS>
  SRPKD_DEVICE void add_channels(float (&to)[G::M_TILES][2], Address a) const {
    constexpr uint32_t ONES = 0x3f803f80;
    float sum[G::M_TILES][4] = {};
#pragma unroll
    for (int term = COUNT_TERMS - 1; term >= 0; --term)
#pragma unroll
      for (int k = 0; k < BLOCK; k += 16)
#pragma unroll
        for (int m = 0; m < G::M_TILES; ++m) {
          uint32_t r[4];
          sm80::Warp<G>::template load<PIXELS_ADJACENT, true>(r, a + term * PANEL_BYTES, 16 * m, k);
          multiply_add<BFloat16>(sum[m], r, ONES, ONES);
        }
#pragma unroll
    for (int m = 0; m < G::M_TILES; ++m) to[m][0] += sum[m][0], to[m][1] += sum[m][2];
  }

  SRPKD_DEVICE void store(const Sums<G>& total, const float (&channel_total)[G::M_TILES][2]) const {
    float* const partial = p.partial + offset_of_partial(image, tiles, index, p.ranges.splits, split);
    const int64_t vector = vector_at(split, p.ranges.splits) + at.row * BLOCK;
    tile.for_each_element([&](int row, int column, int m, int n, int i) {
      store_global(partial + row * BLOCK + column, total[m][n][i]);
      if (diagonal && row == column) {
        store_global(p.squares + vector + row, total[m][n][i]);
      }
    });
    if (diagonal && tile.warp.warp_n == 0 && tile.warp.member == 0)
      for (int m = 0; m < G::M_TILES; ++m)
        for (int half = 0; half < 2; ++half)
          store_global(p.sums + vector + tile.warp.row(m, half), channel_total[m][half]);
  }
};

// Returns the largest power of two below the root of M's largest element, and the reciprocal of its square: see
// formulas.power_of_two_scale. Its exponent is at least that of the smallest normal number: 1 / size^2 must be finite.
SRPKD_DEVICE float power_of_two_scale(float largest) {
  const int exponent = static_cast<int>(as_bits(largest) >> 23) - 127;
  return as_float((127 + ((exponent < -126 ? -126 : exponent) >> 1)) << 23);
}
SRPKD_DEVICE float inverse_square(float size) { return as_float((3 * 127u - 2 * (as_bits(size) >> 23)) << 23); }

// Returns the larger number, or NaN if one is NaN.
SRPKD_DEVICE float larger(float a, float b) { return a >= b || a != a ? a : b; }

// Adds the partial moments. Grid: (images * tiles of both networks, strips of a tile).
template <int THREADS_>
struct FinishMoments {
  using Arguments = FinishArguments;
  static constexpr int THREADS = THREADS_, MIN_BLOCKS = 2;
  static constexpr int BATCH = 2048 / THREADS;  // ranges whose sums of a channel are under way: a thread has registers
  // mean of the rows and the columns, their difference to the shift, and the largest square of each warp
  static constexpr int MEANS_AT = 0, OFFSETS_AT = 2 * BLOCK * 8, LARGEST_AT = 4 * BLOCK * 8;
  static constexpr int STRIPS_AT = LARGEST_AT + THREADS / 32 * 4;
  using Strip = StripOfMatrix<THREADS, BFloat16>;
  static constexpr int SHARED_BYTES = STRIPS_AT + 2 * Strip::BYTES;

  const MomentArguments& p;
  const MomentResults& results;
  const BlockIndex own_block;
  const Address shared = shared_memory();
  const int channels_t = p.features[TEACHER].channels, channels_s = p.features[STUDENT].channels;
  const int tiles_t = tiles_of(channels_t), tiles = tiles_t + tiles_of(channels_s);
  const int index = own_block.x % tiles, image = own_block.x / tiles, splits = p.ranges.splits;
  const int first_row = own_block.y * STRIP;
  const int network = index < tiles_t ? TEACHER : STUDENT, channels = network == STUDENT ? channels_s : channels_t;
  const int blocks = blocks_of(channels), tile = index - (network == STUDENT ? tiles_t : 0);
  const TileOfMoment at = tile_of_moment(tile, blocks);
  const int both = padded(channels_t) + padded(channels_s), first = network == STUDENT ? padded(channels_t) : 0;

  SRPKD_DEVICE FinishMoments(const Arguments& arguments, BlockIndex block)
      : p(arguments.sums), results(arguments.results), own_block(block) {}

  // Computes the means of this tile's channels, and returns the largest diagonal element of M.
  SRPKD_DEVICE float reduce_channels() const {
    float largest = 0;
#pragma unroll 1
    for (int c = thread_index(); c < blocks * BLOCK; c += THREADS) {
      const int64_t vector = int64_t{image} * splits * both + first + c;
      const double shift = load_global_coherent(p.shift + int64_t{image} * both + first + c), count = p.pixels;
      CompensatedSum sum, square;
#pragma unroll 1
      for (int begin = 0; begin < splits; begin += BATCH) {
        float part[BATCH][2];  // under way together
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          const int64_t at_split = vector + int64_t{begin + i} * both;
          part[i][0] = begin + i < splits ? load_global_coherent(p.sums + at_split) : 0.f;
          part[i][1] = begin + i < splits ? load_global_coherent(p.squares + at_split) : 0.f;
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) sum.add(part[i][0]), square.add(part[i][1]);
      }
      const double offset = sum.value() / count;
      const auto whole = static_cast<float>(square.value() + count * shift * (2 * offset + shift));
      largest = larger(largest, whole);
      for (int side = 0; side < 2; ++side) {
        const int place = c - (side ? at.column : at.row) * BLOCK;
        if (place < 0 || place >= BLOCK) continue;
        store_shared(shared + MEANS_AT + (side * BLOCK + place) * 8, shift + offset);
        store_shared(shared + OFFSETS_AT + (side * BLOCK + place) * 8, offset);
      }
    }
    for (int lanes = 1; lanes < 32; lanes *= 2) largest = larger(largest, shuffle_xor(largest, lanes));
    if (thread_index() % 32 == 0) store_shared(shared + LARGEST_AT + thread_index() / 32 * 4, largest);
    sync_block();
    for (int warp = 0; warp < THREADS / 32; ++warp)
      largest = larger(largest, load_shared<float>(shared + LARGEST_AT + warp * 4));
    return largest;
  }

  SRPKD_DEVICE double vector(int base, int side, int place) const {
    return load_shared<double>(shared + base + (side * BLOCK + place) * 8);
  }

  SRPKD_DEVICE void run() const {
    StripOfPartials<THREADS, MAX_SPLITS> partials(p.partial + offset_of_partial(image, tiles, index, splits, 0), splits,
                                                  first_row);
    const float size = power_of_two_scale(reduce_channels()), scale = inverse_square(size);
    const double count = p.pixels;
    const int64_t matrix = image * elements_of_terms(channels);
    const bool mirrored = at.row != at.column;
    const Address buffer = shared + STRIPS_AT;
    const Strip of_centred{results.centred[network] + matrix, at, blocks, first_row, mirrored, buffer};
    const Strip of_whole{results.whole + matrix, at, blocks, first_row, mirrored, buffer + Strip::BYTES};
    partials.for_each_sum([&](int row, int column, const double (&sums)[MATRIX_UNIT]) {
      float centred[MATRIX_UNIT], whole[MATRIX_UNIT];
      for (int i = 0; i < MATRIX_UNIT; ++i) {
        const double sum = sums[i] - count * vector(OFFSETS_AT, 0, row) * vector(OFFSETS_AT, 1, column + i);
        centred[i] = static_cast<float>(sum) * scale;
        whole[i] = static_cast<float>(sum + count * vector(MEANS_AT, 0, row) * vector(MEANS_AT, 1, column + i)) * scale;
      }
      of_centred.store(row, column, centred);
      if (network == STUDENT) of_whole.store(row, column, whole);
    });
    sync_block();
    of_centred.store_mirrored();
    if (network == STUDENT) of_whole.store_mirrored();
    const int thread = thread_index();
    if (first_row != 0) return;
    if (at.row == at.column && thread < BLOCK)
      store_global(results.mean + int64_t{image} * both + first + at.row * BLOCK + thread,
                   static_cast<float>(vector(MEANS_AT, 0, thread) / size) * sqrtf(static_cast<float>(p.pixels)));
    if (thread == 0) {
      if (tile == 0) store_global(results.size + image * 2 + network, size);
      if (network == STUDENT && results.counters)
        store_global(results.counters + image * tiles_of(channels_s) + tile, 0);
    }
  }
};

// Adds at most MOST ranges of a strip of M_w, of which `tile` counts those of all images. `buffer`: of StripOfMatrix.
template <int THREADS, int MOST, class SumsOfTiles>
SRPKD_DEVICE void finish_strip(const WeightedMomentArguments<SumsOfTiles>& p, int tile, int strip, Address buffer) {
  const int channels = p.features.channels, blocks = blocks_of(channels), tiles = tiles_of(channels);
  const int image = tile / tiles, row = strip * STRIP;
  const TileOfMoment at = tile_of_moment(tile % tiles, blocks);
  StripOfPartials<THREADS, MOST> partials(p.partial + offset_of_partial(image, tiles, tile % tiles, p.ranges.splits, 0),
                                          p.ranges.splits, row);
  const float scale = inverse_square(load_global(p.size + image * 2 + STUDENT));
  const StripOfMatrix<THREADS, BFloat16> to{
      p.weighted + image * elements_of_terms(channels), at, blocks, row, at.row != at.column, buffer};
  partials.for_each_sum([&](int of_row, int column, const double (&sums)[MATRIX_UNIT]) {
    float x[MATRIX_UNIT];
    for (int i = 0; i < MATRIX_UNIT; ++i) x[i] = static_cast<float>(sums[i]) * scale;
    to.store(of_row, column, x);
  });
  sync_block();
  to.store_mirrored();
}

// Grid: (images * tiles, splits).
template <class T, bool PIXELS_ADJACENT, class SumsOfTiles>
struct WeightedMoment {
  using Arguments = WeightedMomentArguments<SumsOfTiles>;
  using Tile = MomentTile<T, PIXELS_ADJACENT>;
  using G = typename Tile::G;
  using Part = typename Tile::Part;
  static constexpr int THREADS = Tile::THREADS, MIN_BLOCKS = 2;
  static constexpr int RIGHT_AT = MATRIX_TERMS * PANEL_BYTES, WEIGHTS_AT = RIGHT_AT + TERMS<T> * PANEL_BYTES;
  static constexpr int SHARED_BYTES = WEIGHTS_AT + BLOCK * 4;

  const Arguments& p;
  const BlockIndex own_block;
  const Tile tile{};
  const Address shared = shared_memory();
  const int blocks = blocks_of(p.features.channels), tiles = tiles_of(p.features.channels);
  const int index = own_block.x % tiles, image = own_block.x / tiles, split = own_block.y;
  const TileOfMoment at = tile_of_moment(index, blocks);
  const float size = load_global(p.size + image * 2 + STUDENT);

  SRPKD_DEVICE WeightedMoment(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  SRPKD_DEVICE void run() const {
    const int first = split * p.ranges.split_pixels, end = minimum(first + p.ranges.split_pixels, p.pixels);
    const Address right = shared + RIGHT_AT, weights = shared + WEIGHTS_AT;
    Sums<G> total{}, sum{};
    Part rows, columns;
    float weight = 0;
    const auto load = [&](const Pixels& pixels) {
      rows.load(p.features, image, pixels, at.row * BLOCK);
      if (at.row == at.column)
        for (int i = 0; i < Part::COUNT; ++i) columns.raw[i] = rows.raw[i];
      else
        columns.load(p.features, image, pixels, at.column * BLOCK);
      const int own = pixels.first + thread_index();
      if (thread_index() < BLOCK) weight = own < end ? weight_of(p.sums, p.alpha, size, image, p.pixels, own) : 0.f;
    };
    load({first, end});
#pragma unroll 1
    for (int pixel = first; pixel < end; pixel += BLOCK) {
      sync_block();  // the panels are free
      if (thread_index() < BLOCK) store_shared(weights + thread_index() * 4, weight);
      columns.template store<G>(right, PANEL_BYTES);
      sync_block();
      rows.template store<MATRIX_TERMS, G>(shared, PANEL_BYTES, [&](float x, int pixel_of_panel, int) {
        return x * load_shared<float>(weights + pixel_of_panel * 4);
      });
      sync_block();
      if (pixel + BLOCK < end) load({pixel + BLOCK, end});  // arrives during the product
      add_product<G, PIXELS_ADJACENT, PIXELS_ADJACENT, MATRIX_TERMS, TERMS<T>>(
          sum, shared + tile.left_offset(), PANEL_BYTES, right + tile.right_offset(), PANEL_BYTES);
      move_sums<G>(total, sum);
    }
    float* const partial = p.partial + offset_of_partial(image, tiles, index, p.ranges.splits, split);
    tile.for_each_element([&](int row, int column, int m, int n, int i) {
      store_global(partial + row * BLOCK + column, total[m][n][i]);
    });
    if (p.counters && is_last_block(p.counters + image * tiles + index, p.ranges.splits, shared)) finish();
  }

  SRPKD_DEVICE void finish() const {
    constexpr int STRIPS_AT = 256;  // other threads may still read the first word
    constexpr int BYTES = StripOfMatrix<THREADS, BFloat16>::BYTES;
    static_assert(STRIPS_AT + 2 * BYTES <= SHARED_BYTES);
#pragma unroll 1
    for (int strip = 0; strip < STRIPS; ++strip)  // two buffers: one is free after the next strip's barrier
      finish_strip<THREADS, MAX_WEIGHTED_SPLITS>(p, own_block.x, strip, shared + STRIPS_AT + strip % 2 * BYTES);
  }
};

// Grid: (images * tiles, strips of a tile).
template <int THREADS_, class SumsOfTiles>
struct FinishWeightedMoment {
  using Arguments = WeightedMomentArguments<SumsOfTiles>;
  static constexpr int THREADS = THREADS_, MIN_BLOCKS = 2, SHARED_BYTES = StripOfMatrix<THREADS, BFloat16>::BYTES;

  const Arguments& p;
  const BlockIndex own_block;

  SRPKD_DEVICE FinishWeightedMoment(const Arguments& arguments, BlockIndex block) : p(arguments), own_block(block) {}

  SRPKD_DEVICE void run() const { finish_strip<THREADS, MAX_SPLITS>(p, own_block.x, own_block.y, shared_memory()); }
};

}  // namespace srpkd::cuda::algebra
