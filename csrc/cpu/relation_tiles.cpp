// The loss, U and h on the CPU, one tile of the relation matrices at a time.
//
// A tile is four products by torch's BLAS (G_s, G_t, and K with the student's features both ways) around one
// vectorised pass over its elements, and stays in a core's cache. Threads claim tiles in the order of the triangle
// map, whose rounds meet every block once. Before a thread adds its share to a block's rows of U and h it waits for
// that block's turn, so contributions come in the order of the rounds whoever computes them: the same bits from run to
// run, with no copy of U for every thread and no barrier. It cannot hang, for a tile waits only for tiles that were
// claimed before it.
#include "relation_tiles.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#if defined(__unix__)
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <string>
#include <thread>
#include <vector>

#include "../common/index.h"
#include "epilogue.h"

namespace srpkd::cpu {
namespace {

using at::Tensor;

// The block of pixels of one image's features (N, C): a view, whatever the strides.
Tensor rows_of(const Tensor& features, Block block) {
  return features.as_strided({block.size, features.size(1)}, features.strides(),
                             features.storage_offset() + block.begin * features.stride(0));
}

// alpha (B, N) with zeros after the last pixel, since whole vectors of a tile's columns are read.
Tensor padded(const Tensor& alpha, const at::TensorOptions& options) {
  if (!alpha.defined()) return alpha;
  Tensor rows = at::zeros({alpha.size(0), round_up(alpha.size(1), LINE)}, options);
  rows.narrow(1, 0, alpha.size(1)).copy_(alpha);
  return rows;
}

// What a thread works in.
struct Workspace {
  Tensor gram_s, gram_t;                   // one tile
  std::array<Tensor, 2> h;                 // its share of h, that of its rows and that of its columns
  std::array<Tensor, 2> student, teacher;  // the features of both widened; undefined where there is no need

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

// A block in the type that sums are kept in: itself, or a copy in `buffer` that is contiguous along the same dimension.
Tensor widened(const Tensor& block, const Tensor& buffer) {
  if (!buffer.defined()) return block;
  const int64_t rows = block.size(0), channels = block.size(1);
  const bool by_channel = block.stride(0) < block.stride(1);
  return buffer.as_strided({rows, channels}, {by_channel ? 1 : channels, by_channel ? rows : 1}).copy_(block);
}

// rows x columns of a workspace, with `stride` elements to a row: the product of two blocks, and zeros after it.
template <typename T>
Tensor gram(const Tensor& workspace, const Tensor& left, const Tensor& right, int64_t stride) {
  const int64_t rows = left.size(0), columns = right.size(0);
  Tensor product = workspace.as_strided({rows, columns}, {stride, 1});
  at::cpu::mm_out(product, left, right.t());
  T* const data = workspace.mutable_data_ptr<T>();
  for (int64_t i = 0; columns < stride && i < rows; ++i)
    std::fill(data + i * stride + columns, data + (i + 1) * stride, T(0));
  return product;
}

template <typename T>
Epilogue<T> epilogue_here() {
#if defined(SRPKD_HAS_AVX2)
  const std::string capability = at::get_cpu_capability();  // ATEN_CPU_CAPABILITY, else what the processor has
  if (capability.rfind("AVX2", 0) == 0 || capability.rfind("AVX512", 0) == 0) return avx2::epilogue;
#endif
  return baseline::epilogue;
}

template <typename T>
void run(const Tensor& student, const Tensor& teacher, const Tensor& alpha_student, const Tensor& alpha_teacher,
         const Options& options, const Tensor& loss, const Tensor& U, const Tensor& h) {
  const int64_t images = student.size(0), pixels = student.size(1);
  const int64_t size =
      options.tile > 0 ? round_up(options.tile, LINE) : tile_size(images, pixels, sizeof(T), at::get_num_threads());
  const int64_t blocks = ceil_div(pixels, size), tiles = tile_count(blocks);
  const int64_t half = round_up(ceil_div(size, 2), LINE);
  const bool need_grad = U.defined();
  const auto type = student.options().dtype(c10::CppTypeToScalarType<T>::value);
  const Epilogue<T> epilogue = epilogue_here<T>();

  const std::vector<Tensor> q_s = student.unbind(0), q_t = teacher.unbind(0);  // (N, C) each
  const std::vector<Tensor> u = need_grad ? U.unbind(0) : std::vector<Tensor>{};
  const Tensor alpha_s = padded(alpha_student, type), alpha_t = padded(alpha_teacher, type);
  std::vector<double> losses(images * tiles);
  std::vector<std::atomic<int64_t>> turns(images * blocks);  // rounds that each block has behind it
  std::atomic<int64_t> claims{0};
  std::atomic<bool> failed{false};

  const int64_t workers = std::min<int64_t>(at::get_num_threads(), images * tiles);
  std::vector<Workspace> workspaces;
  for (int64_t worker = 0; worker < workers; ++worker) workspaces.emplace_back(size, student, teacher, type);

  // U and h of the block's pixels get their share of a tile
  const auto add_share = [&](int64_t image, Block block, const Tensor& K, const Tensor& features, const Tensor& share) {
    Tensor sum = rows_of(u[image], block);
    at::cpu::addmm_(sum, K, features);
    if (!h.defined()) return;
    T* const sums = h.mutable_data_ptr<T>() + image * pixels + block.begin;
    const T* const shares = share.const_data_ptr<T>();
    for (int64_t i = 0; i < block.size; ++i) sums[i] += shares[i];
  };

  // the relations of the pixels i to the pixels j; returns their share of the loss
  const auto relate = [&](Workspace& space, int64_t image, Block i, Block j, bool mirrored, const auto& await_turn) {
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
    const double share = epilogue(
        {i.size, stride, space.gram_s.template mutable_data_ptr<T>(), space.gram_t.template const_data_ptr<T>(),
         alpha(alpha_s, i), alpha(alpha_t, i), alpha(alpha_s, j), alpha(alpha_t, j),
         space.h[0].template mutable_data_ptr<T>(), space.h[1].template mutable_data_ptr<T>(), T(options.delta)},
        {options.normalize, options.distance, need_grad, mirrored});
    if (need_grad) {
      await_turn();
      add_share(image, i, K, s_j, space.h[0]);
      if (mirrored) add_share(image, j, K.t(), s_i, space.h[1]);
    }
    return share;
  };

  const auto work = [&](Workspace& space) {
    for (int64_t claim; !failed && (claim = claims++) < images * tiles;) {
      const int64_t image = claim % images, index = claim / images;  // images side by side: fewer waits
      const Tile tile = tile_at(index, blocks);
      std::atomic<int64_t>* const turn = turns.data() + image * blocks;
      const auto await_turn = [&] {
        for (const int64_t block : {tile.row, tile.column})
          while (turn[block].load(std::memory_order_acquire) != tile.round && !failed) std::this_thread::yield();
      };
      double& share = losses[image * tiles + index];
      const Block i = block_at(tile.row, size, pixels), j = block_at(tile.column, size, pixels);
      if (tile.mirrored()) {
        share = relate(space, image, i, j, true, await_turn);
      } else {  // symmetric within itself: cut once more
        const Block first = {i.begin, std::min(i.size, half)}, second = {i.begin + half, i.size - first.size};
        share = relate(space, image, first, first, false, await_turn);
        if (second.size > 0) {
          share += relate(space, image, second, second, false, await_turn);
          share += relate(space, image, second, first, true, await_turn);
        }
      }
      for (const int64_t block : {tile.row, tile.column}) turn[block].store(tile.round + 1, std::memory_order_release);
    }
  };

  at::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // it is per thread
    try {
      work(workspaces[worker]);
    } catch (...) {
      failed = true;  // or others would wait for ever for this thread's tile
      throw;
    }
  });

  double* const total = loss.mutable_data_ptr<double>();
  for (int64_t image = 0; image < images; ++image)
    for (int64_t index = 0; index < tiles; ++index) total[image] += losses[image * tiles + index];
}

}  // namespace

int64_t cache_bytes() {
  long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return bytes > 0 ? bytes : 512 * 1024;  // 0 where the system does not tell
}

int64_t tile_size(int64_t images, int64_t pixels, int64_t element_bytes, int64_t threads) {
  // one of the two Gram tiles fills the cache: smaller tiles slow the products down more than misses do
  const auto fits = static_cast<int64_t>(std::sqrt(cache_bytes() / element_bytes));
  int64_t size = std::clamp<int64_t>(fits / LINE * LINE, 64, 512);
  // a round has blocks / 2 tiles for every image: as many as there are threads, or they would wait for turns
  while (size > 64 && images * ceil_div(pixels, size) < 2 * threads) size -= LINE;
  return std::min(size, round_up(ceil_div(pixels, ceil_div(pixels, size)), LINE));  // blocks of like sizes
}

void relation_tiles(const Tensor& student, const Tensor& teacher, const Tensor& alpha_s, const Tensor& alpha_t,
                    const Options& options, const Tensor& loss, const Tensor& U, const Tensor& h) {
  const auto run_as = student.scalar_type() == at::kDouble ? run<double> : run<float>;
  run_as(student, teacher, alpha_s, alpha_t, options, loss, U, h);
}

}  // namespace srpkd::cpu
