// The loss, U and h on the CPU, one tile of the relation matrices at a time.
//
// A tile takes four matrix products (G_s, G_t, and K and its transpose times the student's features) and one vectorised
// pass over its elements, and stays in a core's cache. Threads claim tiles in the order of the triangle map, in which
// every round contains each block once. Before a thread adds to a block's rows of U and h, it waits until the block's
// earlier rounds are complete. So contributions are added in the order of the rounds, whichever thread computes them:
// results are bit-identical from run to run, without a copy of U per thread and without a barrier. There is no
// deadlock, because a tile waits only for tiles that were claimed before it.
#include "relation_tiles.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#if defined(__unix__)
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <vector>

#include "../common/index.h"
#include "kernels.h"
#include "packed_features.h"
#include "tile_workers.h"

namespace srpkd::cpu {
namespace {

using at::Tensor;

// Returns alpha (B, N) padded with zeros after the last pixel, because the epilogue reads whole vectors.
Tensor padded(const Tensor& alpha, const at::TensorOptions& options) {
  if (!alpha.defined()) return alpha;
  Tensor rows = at::zeros({alpha.size(0), round_up(alpha.size(1), LINE)}, options);
  rows.narrow(1, 0, alpha.size(1)).copy_(alpha);
  return rows;
}

// The buffers of one thread.
template <typename S>
struct Workspace {
  using T = SumOf<S>;
  using Packed = PackedFeatures<S>;

  Packed student_i, student_j, teacher_i, teacher_j;  // of the rows and of the columns of a tile
  Tensor gram_s, gram_t;                              // (size, size)
  Tensor h_i, h_j, U_i, U_j;                          // (size,), (size, C_s): the tile's parts of h and U

  Workspace(int64_t size, int64_t channels_s, int64_t channels_t, bool need_grad)
      : student_i(size, channels_s, Packed::LEFT | (need_grad ? Packed::TRANSPOSED_PRODUCT : Packed::NONE)),
        student_j(size, channels_s, Packed::RIGHT | (need_grad ? Packed::PRODUCT : Packed::NONE)),
        teacher_i(size, channels_t, Packed::LEFT),
        teacher_j(size, channels_t, Packed::RIGHT) {
    constexpr at::ScalarType type = c10::CppTypeToScalarType<T>::value;
    gram_s = at::empty({size, size}, type), gram_t = at::empty({size, size}, type);
    h_i = at::empty({size}, type), h_j = at::empty({size}, type);
    if (need_grad) U_i = at::empty({size, channels_s}, type), U_j = at::empty({channels_s, size}, type);
  }
};

template <typename S>
void run(const Tensor& student, const Tensor& teacher, const Tensor& alpha_student, const Tensor& alpha_teacher,
         const Relation& relation, int64_t tile, const Tensor& loss, const Tensor& U, const Tensor& h) {
  using T = SumOf<S>;
  const int64_t images = student.size(0), pixels = student.size(1), channels = student.size(2);
  const int64_t size =
      tile > 0 ? round_up(std::min(tile, pixels), LINE) : tile_size(images, pixels, sizeof(T), at::get_num_threads());
  const int64_t blocks = ceil_div(pixels, size), tiles = tile_count(blocks);
  const int64_t half = round_up(ceil_div(size, 2), LINE);
  const bool need_grad = U.defined();
  const Kernels<T>& kernels = select_kernels<T>();

  const auto type = at::device(at::kCPU).dtype(c10::CppTypeToScalarType<T>::value);
  const Tensor alpha_s = padded(alpha_student, type), alpha_t = padded(alpha_teacher, type);
  std::vector<std::atomic<int64_t>> rounds_done(images * blocks);  // of each block
  TileWorkers workers(images, tiles);

  // Adds a tile's part (N, C) of U, and that of h, to those of a block's pixels.
  const auto accumulate = [&](int64_t image, Block block, const Matrix<const T>& part, const T* part_of_h) {
    const Matrix<T> sum = image_of(U, image, U.mutable_data_ptr<T>()).row_range(block.begin, block.size);
    for_each_pair(part, sum, [](T term, T& total) { total += term; });
    if (!h.defined()) return;
    T* const sums = h.mutable_data_ptr<T>() + image * pixels + block.begin;
    for (int64_t i = 0; i < block.size; ++i) sums[i] += part_of_h[i];
  };

  // Processes the rows i and the columns j, and returns their part of the loss.
  const auto process = [&](Workspace<S>& space, int64_t image, Block i, Block j, bool mirrored,
                           const auto& wait_for_turn) {
    const auto pack = [&](PackedFeatures<S>& packed, const Tensor& features, Block block) {
      packed.set(image_of(features, image, features.const_data_ptr<S>()).row_range(block.begin, block.size));
      packed.pack({0, block.size});
    };
    pack(space.student_i, student, i), pack(space.student_j, student, j);
    pack(space.teacher_i, teacher, i), pack(space.teacher_j, teacher, j);
    T* const K = space.gram_s.template mutable_data_ptr<T>();  // overwrites G_s
    T* const gram_t = space.gram_t.template mutable_data_ptr<T>();
    const int64_t stride = round_up(j.size, LINE);
    const Block rows = {0, i.size}, columns = {0, j.size};
    PackedFeatures<S>::gram(space.student_i, rows, space.student_j, columns, {K, stride});
    PackedFeatures<S>::gram(space.teacher_i, rows, space.teacher_j, columns, {gram_t, stride});

    const auto alpha = [&](const Tensor& alpha, Block block) {
      return alpha.defined() ? alpha.const_data_ptr<T>() + image * alpha.size(1) + block.begin : nullptr;
    };
    T* const h_i = space.h_i.template mutable_data_ptr<T>();
    T* const h_j = space.h_j.template mutable_data_ptr<T>();
    const double part =
        kernels.epilogue({i.size, stride, K, gram_t, K, alpha(alpha_s, i), alpha(alpha_t, i), alpha(alpha_s, j),
                          alpha(alpha_t, j), h_i, h_j, T(relation.delta), 0},
                         {relation.normalize, relation.distance, need_grad, mirrored, relation.rectify});
    if (!need_grad) return part;
    T* const U_i = space.U_i.template mutable_data_ptr<T>();
    T* const U_j = space.U_j.template mutable_data_ptr<T>();
    space.student_j.product({K, stride}, i.size, columns, U_i);
    if (mirrored) space.student_i.transposed_product({K, stride}, j.size, rows, U_j);
    if (!wait_for_turn()) return part;
    accumulate(image, i, Matrix<const T>{U_i, i.size, channels, channels, 1}, h_i);
    if (mirrored) accumulate(image, j, Matrix<const T>{U_j, j.size, channels, 1, stride}, h_j);
    return part;
  };

  const auto work = [&](Workspace<S>& space, int64_t image, int64_t index) {
    const Tile tile = tile_at(index, blocks);
    std::atomic<int64_t>* const done = rounds_done.data() + image * blocks;
    const auto wait_for_turn = [&] {
      return workers.wait_for(done[tile.row], tile.round) && workers.wait_for(done[tile.column], tile.round);
    };
    double part;
    const Block i = block_at(tile.row, size, pixels), j = block_at(tile.column, size, pixels);
    if (tile.mirrored()) {
      part = process(space, image, i, j, true, wait_for_turn);
    } else {  // symmetric: compute the lower triangle of its four quarters
      const Block first = {i.begin, std::min(i.size, half)}, second = {i.begin + half, i.size - first.size};
      part = process(space, image, first, first, false, wait_for_turn);
      if (second.size > 0) {
        part += process(space, image, second, second, false, wait_for_turn);
        part += process(space, image, second, first, true, wait_for_turn);
      }
    }
    if (need_grad && !wait_for_turn()) return part;
    for (const int64_t block : {tile.row, tile.column}) done[block].store(tile.round + 1, std::memory_order_release);
    return part;
  };
  workers.run([&] { return Workspace<S>(size, channels, teacher.size(2), need_grad); }, work,
              loss.mutable_data_ptr<double>());
}

}  // namespace

int64_t cache_bytes() {
  static const int64_t found = [] {
    long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (bytes <= 0) {  // sysconf does not know the size on ARM
      long kilobytes = 0;
      std::ifstream("/sys/devices/system/cpu/cpu0/cache/index2/size") >> kilobytes;  // such as "1024K"
      bytes = kilobytes * 1024;
    }
    return bytes > 0 ? bytes : 512 * 1024;
  }();
  return found;
}

int64_t tile_size(int64_t images, int64_t pixels, int64_t element_bytes, int64_t threads) {
  // One of the two Gram tiles fills the cache: smaller tiles slow the products down more than cache misses do.
  const auto fits = static_cast<int64_t>(std::sqrt(cache_bytes() / element_bytes));
  int64_t size = std::clamp<int64_t>(fits / LINE * LINE, 64, 512);
  // A round has blocks / 2 tiles per image. With fewer tiles than threads, threads would wait for one another.
  while (size > 64 && images * ceil_div(pixels, size) < 2 * threads) size -= LINE;
  return std::min(size, round_up(ceil_div(pixels, ceil_div(pixels, size)), LINE));  // blocks of nearly equal size
}

void relation_tiles(const Tensor& student, const Tensor& teacher, const Tensor& alpha_s, const Tensor& alpha_t,
                    const Relation& relation, int64_t tile, const Tensor& loss, const Tensor& U, const Tensor& h) {
  with_feature_type(student, [&](auto element) {
    run<decltype(element)>(student, teacher, alpha_s, alpha_t, relation, tile, loss, U, h);
  });
}

}  // namespace srpkd::cpu
