// The loss, U and h on the CPU, one tile of the relation matrices at a time.
//
// A tile takes four matrix products by torch's BLAS (G_s, G_t, and K and its transpose times the student's features)
// and one vectorised pass over its elements, and stays in a core's cache. Threads claim tiles in the order of the
// triangle map, in which every round contains each block once. Before a thread adds to a block's rows of U and h, it
// waits until the block's earlier rounds are complete. So contributions are added in the order of the rounds, whichever
// thread computes them: results are bit-identical from run to run, without a copy of U per thread and without a
// barrier. There is no deadlock, because a tile waits only for tiles that were claimed before it.
#include "relation_tiles.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#if defined(__unix__)
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <vector>

#include "../common/index.h"
#include "gram.h"
#include "kernels.h"
#include "tile_workers.h"

namespace srpkd::cpu {
namespace {

using at::Tensor;

// Returns a view of one block of pixels of an image's features (N, C), which may have any strides.
Tensor rows_of(const Tensor& features, Block block) {
  return features.as_strided({block.size, features.size(1)}, features.strides(),
                             features.storage_offset() + block.begin * features.stride(0));
}

// Returns alpha (B, N) padded with zeros after the last pixel, because the epilogue reads whole vectors.
Tensor padded(const Tensor& alpha, const at::TensorOptions& options) {
  if (!alpha.defined()) return alpha;
  Tensor rows = at::zeros({alpha.size(0), round_up(alpha.size(1), LINE)}, options);
  rows.narrow(1, 0, alpha.size(1)).copy_(alpha);
  return rows;
}

// The buffers of one thread.
struct Workspace {
  Tensor gram_s, gram_t;                   // one tile
  std::array<Tensor, 2> h;                 // its part of h, for its rows and for its columns
  std::array<Tensor, 2> student, teacher;  // features of both blocks, widened; undefined if not needed

  Workspace(int64_t size, const Tensor& q_s, const Tensor& q_t, const at::TensorOptions& options)
      : gram_s(at::empty({size, size}, options)), gram_t(at::empty({size, size}, options)) {
    for (int side = 0; side < 2; ++side) {
      h[side] = at::empty({size}, options);
      if (q_s.scalar_type() == gram_s.scalar_type()) continue;
      student[side] = at::empty({size, q_s.size(2)}, options);
      teacher[side] = at::empty({size, q_t.size(2)}, options);
    }
  }
};

// Returns a block in the dtype of the accumulator: the block itself, or a copy in `buffer` that is contiguous along the
// same dimension.
Tensor widened(const Tensor& block, const Tensor& buffer) {
  if (!buffer.defined()) return block;
  const int64_t rows = block.size(0), channels = block.size(1);
  const bool by_channel = block.stride(0) < block.stride(1);
  return buffer.as_strided({rows, channels}, {by_channel ? 1 : channels, by_channel ? rows : 1}).copy_(block);
}

template <typename T>
void run(const Tensor& student, const Tensor& teacher, const Tensor& alpha_student, const Tensor& alpha_teacher,
         const Relation& relation, int64_t tile, const Tensor& loss, const Tensor& U, const Tensor& h) {
  const int64_t images = student.size(0), pixels = student.size(1);
  const int64_t size = tile > 0 ? round_up(tile, LINE) : tile_size(images, pixels, sizeof(T), at::get_num_threads());
  const int64_t blocks = ceil_div(pixels, size), tiles = tile_count(blocks);
  const int64_t half = round_up(ceil_div(size, 2), LINE);
  const bool need_grad = U.defined();
  const auto type = student.options().dtype(c10::CppTypeToScalarType<T>::value);
  const Kernels<T>& kernels = select_kernels<T>();

  const std::vector<Tensor> q_s = student.unbind(0), q_t = teacher.unbind(0);  // (N, C) each
  const std::vector<Tensor> u = need_grad ? U.unbind(0) : std::vector<Tensor>{};
  const Tensor alpha_s = padded(alpha_student, type), alpha_t = padded(alpha_teacher, type);
  std::vector<std::atomic<int64_t>> rounds_done(images * blocks);  // of each block
  TileWorkers workers(images, tiles);

  // Adds a tile's part to U and h of one block's pixels.
  const auto accumulate = [&](int64_t image, Block block, const Tensor& K, const Tensor& features, const Tensor& part) {
    Tensor sum = rows_of(u[image], block);
    at::cpu::addmm_(sum, K, features);
    if (!h.defined()) return;
    T* const sums = h.mutable_data_ptr<T>() + image * pixels + block.begin;
    const T* const parts = part.const_data_ptr<T>();
    for (int64_t i = 0; i < block.size; ++i) sums[i] += parts[i];
  };

  // Processes the rows i and the columns j, and returns their part of the loss.
  const auto process = [&](Workspace& space, int64_t image, Block i, Block j, bool mirrored,
                           const auto& wait_for_turn) {
    const int64_t stride = round_up(j.size, LINE);
    const Tensor s_i = widened(rows_of(q_s[image], i), space.student[0]);
    const Tensor s_j = mirrored ? widened(rows_of(q_s[image], j), space.student[1]) : s_i;
    const Tensor K = gram<T>(space.gram_s, s_i, s_j, stride);
    const Tensor t_i = widened(rows_of(q_t[image], i), space.teacher[0]);
    const Tensor t_j = mirrored ? widened(rows_of(q_t[image], j), space.teacher[1]) : t_i;
    gram<T>(space.gram_t, t_i, t_j, stride);

    const auto alpha = [&](const Tensor& alpha, Block block) {
      return alpha.defined() ? alpha.const_data_ptr<T>() + image * alpha.size(1) + block.begin : nullptr;
    };
    T* const gram_s = space.gram_s.template mutable_data_ptr<T>();  // overwritten with K
    const double part = kernels.epilogue(
        {i.size, stride, gram_s, space.gram_t.template const_data_ptr<T>(), gram_s, alpha(alpha_s, i),
         alpha(alpha_t, i), alpha(alpha_s, j), alpha(alpha_t, j), space.h[0].template mutable_data_ptr<T>(),
         space.h[1].template mutable_data_ptr<T>(), T(relation.delta), 0},
        {relation.normalize, relation.distance, need_grad, mirrored, relation.rectify});
    if (need_grad && wait_for_turn()) {
      accumulate(image, i, K, s_j, space.h[0]);
      if (mirrored) accumulate(image, j, K.t(), s_i, space.h[1]);
    }
    return part;
  };

  const auto work = [&](Workspace& space, int64_t image, int64_t index) {
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
  workers.run([&] { return Workspace(size, student, teacher, type); }, work, loss.mutable_data_ptr<double>());
}

}  // namespace

int64_t cache_bytes() {
  long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return bytes > 0 ? bytes : 512 * 1024;  // sysconf returns 0 if the size is unknown
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
  const auto run_as = student.scalar_type() == at::kDouble ? run<double> : run<float>;
  run_as(student, teacher, alpha_s, alpha_t, relation, tile, loss, U, h);
}

}  // namespace srpkd::cpu
