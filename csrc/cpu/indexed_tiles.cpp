// The loss, U and h of indexed pairs on the CPU, one tile at a time.
//
// A tile copies the features of its rows and columns next to each other, and then takes the same products and the same
// epilogue as a tile of relation_tiles.cpp. Threads claim tiles in order and add to U and h in that order, because the
// pixels of any two tiles may overlap: results are bit-identical from run to run. Only the additions wait for their
// turn. There is no deadlock, because a tile waits only for tiles that were claimed before it.
#include "indexed_tiles.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../common/arguments.h"
#include "../common/index.h"
#include "kernels.h"
#include "packed_features.h"
#include "relation_tiles.h"
#include "tile_workers.h"

namespace srpkd::cpu {
namespace {

using at::Tensor;

// One side of a tile, its rows or its columns: their pixels, and copies of what belongs to them.
template <typename T>
struct Side {
  std::vector<int64_t> pixels;
  Tensor student, teacher;  // (size, C_s), (size, C_t)
  PackedFeatures<T> packed_s, packed_t;
  Tensor alpha_s, alpha_t;  // (size,), padded with zeros
  Tensor U, h;              // (size * C_s,), (size,): the tile's parts

  Side(int64_t size, const Pixels& source, unsigned use, unsigned use_of_product)
      : packed_s(size, source.student.size(2), use | use_of_product), packed_t(size, source.teacher.size(2), use) {
    const auto space = [&](auto... sizes) { return at::empty({sizes...}, source.student.options()); };
    student = space(size, source.student.size(2)), teacher = space(size, source.teacher.size(2));
    alpha_s = space(size), alpha_t = space(size);
    U = space(size * source.student.size(2)), h = space(size);
  }

  int64_t size() const { return static_cast<int64_t>(pixels.size()); }

  // Copies the features and scales of `pixels` of an image.
  void gather(const Pixels& source, int64_t image) {
    pack(source.student, image, student, packed_s);
    pack(source.teacher, image, teacher, packed_t);
    if (source.alpha_s.defined()) {
      copy_scales(source.alpha_s, image, alpha_s);
      copy_scales(source.alpha_t, image, alpha_t);
    }
  }

  // Adds the tile's part of U, which is row-major, and that of h to those of an image.
  void add_rows(const Tensor& all_U, const Tensor& all_h, int64_t image) const {
    const int64_t channels = all_U.size(2);
    const T* const part = U.const_data_ptr<T>();
    T* const rows = rows_of(all_U, image);
    for (int64_t k = 0; k < size(); ++k) {
      T* const row = rows + pixels[k] * channels;
      for (int64_t c = 0; c < channels; ++c) row[c] += part[k * channels + c];
    }
    add_h(all_h, image);
  }

  // The same for a part of U whose columns are adjacent, with rows of `stride` elements: (C, stride).
  void add_columns(const Tensor& all_U, const Tensor& all_h, int64_t image, int64_t stride) const {
    constexpr int64_t SIDE = 16;  // pixels, whose rows of U stay in the cache
    const int64_t channels = all_U.size(2);
    const T* const part = U.const_data_ptr<T>();
    T* const rows = rows_of(all_U, image);
    for (int64_t first = 0; first < size(); first += SIDE)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = first; k < std::min(first + SIDE, size()); ++k)
          rows[pixels[k] * channels + c] += part[c * stride + k];
    add_h(all_h, image);
  }

 private:
  static T* rows_of(const Tensor& all_U, int64_t image) {
    return all_U.mutable_data_ptr<T>() + image * all_U.size(1) * all_U.size(2);
  }

  void add_h(const Tensor& all_h, int64_t image) const {
    if (!all_h.defined()) return;
    T* const data = all_h.mutable_data_ptr<T>() + image * all_h.size(1);
    const T* const terms = h.const_data_ptr<T>();
    for (int64_t k = 0; k < size(); ++k) data[pixels[k]] += terms[k];
  }

  void pack(const Tensor& features, int64_t image, const Tensor& selected, PackedFeatures<T>& packed) const {
    const int64_t channels = features.size(2);
    const T* const rows = features.const_data_ptr<T>() + image * features.size(1) * channels;
    T* const copy = selected.mutable_data_ptr<T>();
    for (int64_t k = 0; k < size(); ++k) std::copy_n(rows + pixels[k] * channels, channels, copy + k * channels);
    packed.set({copy, size(), channels, channels, 1});
    packed.pack({0, size()});
  }

  void copy_scales(const Tensor& alpha, int64_t image, const Tensor& copy) const {
    const T* const scales = alpha.const_data_ptr<T>() + image * alpha.size(1);
    T* const place = copy.mutable_data_ptr<T>();
    for (int64_t k = 0; k < size(); ++k) place[k] = scales[pixels[k]];
    std::fill(place + size(), place + copy.numel(), T(0));
  }
};

// The buffers of one thread.
template <typename T>
struct Workspace {
  Tensor gram_s, gram_t;
  Side<T> rows, columns;

  Workspace(int64_t size, const Pixels& pixels)
      : gram_s(at::empty({size, size}, pixels.student.options())),
        gram_t(at::empty({size, size}, pixels.student.options())),
        rows(size, pixels, PackedFeatures<T>::LEFT, PackedFeatures<T>::TRANSPOSED_PRODUCT),
        columns(size, pixels, PackedFeatures<T>::RIGHT, PackedFeatures<T>::PRODUCT) {}
};

template <typename T>
void run(const Pixels& rows, const Pixels& columns, const Tensor& index, const Relation& relation, bool mirrored,
         int64_t tile, const Tensor& loss, const Tensor& U, const Tensor& h) {
  const int64_t images = rows.student.size(0), pixels = rows.student.size(1), column_pixels = columns.student.size(1);
  const int64_t sets = index.size(1), listed = index.size(2), rows_of_set = ceil_div(pixels, sets);
  const int64_t longest = std::max(rows_of_set, listed);
  const int64_t size = tile > 0 ? round_up(std::min(tile, longest), LINE)
                                : tile_size(images * sets, longest, sizeof(T), at::get_num_threads());
  const int64_t row_blocks = ceil_div(rows_of_set, size), column_blocks = ceil_div(listed, size);
  const int64_t tiles = sets * row_blocks * column_blocks;  // of an image
  const bool need_grad = U.defined();
  const Kernels<T>& kernels = select_kernels<T>();
  const int64_t* const listed_pixels = index.const_data_ptr<int64_t>();

  std::vector<std::atomic<int64_t>> tiles_done(images);
  TileWorkers workers(images, tiles);

  // Sets the pixels of both sides of a tile.
  const auto select = [&](Workspace<T>& space, int64_t image, int64_t set, int64_t row_block, int64_t column_block) {
    const Block block = block_at(column_block, size, listed);
    const int64_t* const first = listed_pixels + (image * sets + set) * listed + block.begin;
    space.columns.pixels.assign(first, first + block.size);
    for (const int64_t pixel : space.columns.pixels)
      TORCH_CHECK_INDEX(pixel >= 0 && pixel < column_pixels, "expected an index of pixels from 0 to ",
                        column_pixels - 1, ", received ", pixel);
    space.rows.pixels.clear();
    for (int64_t k = row_block * size; k < std::min((row_block + 1) * size, rows_of_set); ++k)
      if (set + k * sets < pixels) space.rows.pixels.push_back(set + k * sets);
  };

  // Makes relations of pixels to themselves exact ties; products, so that NaN stays NaN.
  const auto clear_ties = [&](Workspace<T>& space, int64_t set, int64_t stride) {
    T* const gram_s = space.gram_s.template mutable_data_ptr<T>();
    T* const gram_t = space.gram_t.template mutable_data_ptr<T>();
    for (int64_t column = 0; column < space.columns.size(); ++column) {
      const int64_t pixel = space.columns.pixels[column];
      if (pixel % sets != set) continue;
      const int64_t row = (pixel - space.rows.pixels.front()) / sets;
      if (pixel < space.rows.pixels.front() || row >= space.rows.size()) continue;
      gram_s[row * stride + column] *= 0;
      gram_t[row * stride + column] *= 0;
    }
  };

  // Returns a tile's part of the loss, and leaves those of U and h in the workspace.
  const auto process = [&](Workspace<T>& space, int64_t image, int64_t set) {
    Side<T>&i = space.rows, &j = space.columns;
    i.gather(rows, image);
    j.gather(columns, image);
    const int64_t stride = round_up(j.size(), LINE);
    const auto read = [](const Tensor& x) { return x.const_data_ptr<T>(); };
    const auto write = [](const Tensor& x) { return x.mutable_data_ptr<T>(); };
    T *const K = write(space.gram_s), *const gram_t = write(space.gram_t);  // K overwrites G_s
    const Block block_i = {0, i.size()}, block_j = {0, j.size()};
    PackedFeatures<T>::gram(i.packed_s, block_i, j.packed_s, block_j, {K, stride});
    PackedFeatures<T>::gram(i.packed_t, block_i, j.packed_t, block_j, {gram_t, stride});
    if (mirrored && relation.normalize == Normalize::cosine) clear_ties(space, set, stride);
    const double part = kernels.epilogue(
        {i.size(), stride, K, gram_t, K, read(i.alpha_s), read(i.alpha_t), read(j.alpha_s), read(j.alpha_t), write(i.h),
         write(j.h), T(relation.delta), stride},  // no element of the tile is on the diagonal
        {relation.normalize, relation.distance, need_grad, mirrored, relation.rectify});
    if (need_grad) {
      j.packed_s.product({K, stride}, i.size(), block_j, write(i.U));
      if (mirrored) i.packed_s.transposed_product({K, stride}, j.size(), block_i, write(j.U));
    }
    return part;
  };

  const auto work = [&](Workspace<T>& space, int64_t image, int64_t place) {
    const int64_t set = place / (row_blocks * column_blocks), block = place % (row_blocks * column_blocks);
    select(space, image, set, block / column_blocks, block % column_blocks);
    const bool is_empty = space.rows.pixels.empty();  // of a set with fewer rows than others
    const double part = is_empty ? 0 : process(space, image, set);
    if (!need_grad || !workers.wait_for(tiles_done[image], place)) return part;
    if (!is_empty) {
      space.rows.add_rows(U, h, image);
      if (mirrored) space.columns.add_columns(U, h, image, round_up(space.columns.size(), LINE));
    }
    tiles_done[image].store(place + 1, std::memory_order_release);
    return part;
  };
  workers.run([&] { return Workspace<T>(size, rows); }, work, loss.mutable_data_ptr<double>());
}

}  // namespace

Tensor by_pixel(const Tensor& features) {
  const at::ScalarType type = accumulator(features.scalar_type());
  if (features.scalar_type() == type && features.is_contiguous()) return features;
  const Tensor source = widened(features), result = at::empty(features.sizes(), features.options().dtype(type));
  with_feature_type(source, [&](auto element) {
    using S = decltype(element);
    const S* const from = source.const_data_ptr<S>();
    auto* const to = result.mutable_data_ptr<SumOf<S>>();
    for_each_panel(source, [&](int64_t image, Block panel) {
      copy(image_of(source, image, from).row_range(panel.begin, panel.size),
           image_of(result, image, to).row_range(panel.begin, panel.size));
    });
  });
  return result;
}

void indexed_tiles(const Pixels& rows, const Pixels& columns, const Tensor& index, const Relation& relation,
                   bool mirrored, int64_t tile, const Tensor& loss, const Tensor& U, const Tensor& h) {
  const auto run_as = rows.student.scalar_type() == at::kDouble ? run<double> : run<float>;
  run_as(rows, columns, index, relation, mirrored, tile, loss, U, h);
}

}  // namespace srpkd::cpu
