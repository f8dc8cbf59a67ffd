// The whole loss on the CPU. The formulas around the tiles are those of kernels/formulas.py.
#include "loss.h"

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <numeric>

#include "../common/arguments.h"
#include "../common/index.h"
#include "indexed_tiles.h"
#include "instructions.h"
#include "matrix.h"
#include "packed_features.h"
#include "relation_matrices.h"
#include "relation_tiles.h"
#include "row_scales.h"

namespace srpkd::cpu {
namespace {

using at::Tensor;

// Autograd would record the formulas, and autocast would round their products.
constexpr c10::DispatchKeySet AROUND_KERNELS =
    c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;

// --- the formulas around the tiles ----------------------------------------------------------------------------------

Tensor pixel_norms(const Tensor& features) {
  const int64_t pixels = features.size(1);
  const Tensor squares = at::empty({features.size(0), pixels}, features.options().dtype(at::kDouble));
  double* const sums = squares.mutable_data_ptr<double>();
  with_feature_type(features, [&](auto element) {
    using S = decltype(element);
    const S* const data = features.const_data_ptr<S>();
    for_each_panel(features, [&](int64_t image, Block panel) {
      sum_squares(image_of(features, image, data).row_range(panel.begin, panel.size),
                  sums + image * pixels + panel.begin);
    });
  });
  return squares.sqrt_().to(accumulator(features.scalar_type()));
}

// Returns alpha and, for row, the moment M; both undefined if normalize is none.
RowScales scales_of(const Tensor& features, const Relation& relation) {
  if (relation.normalize == Normalize::none) return {};
  if (relation.normalize == Normalize::row) return row_scales(features, relation.eps);
  return {inverse(pixel_norms(features), relation.eps), {}};
}

// Overwrites U with N^2 dL/dQ, which is U itself if h is undefined; else with w_i = h_i alpha_i^2,
//     cosine    U_i - w_i q_i
//     row       U_i - w_i M q_i - M_w q_i,  M_w = Q^T diag(w) Q
void correct(const Tensor& U, const Tensor& h, const Tensor& features, const RowScales& scale) {
  if (!h.defined()) return;
  if (!scale.moment.defined()) {
    U.sub_((h * scale.alpha.square()).unsqueeze(2) * features);
    return;
  }
  const Tensor size = power_of_two_scale(scale.moment);  // w_i is multiplied by its square, M divided by it
  const Tensor weighted = (h * (scale.alpha * size.squeeze(2)).square_()).unsqueeze(2) * features;
  const Tensor sum = U.mT();
  sum.baddbmm_(scale.moment / size.square(), weighted.mT(), 1, -1);
  sum.baddbmm_(at::bmm(weighted.mT(), features) / size.square(), features.mT(), 1, -1);
}

// Writes the loss of each image (B,) in double, and `gradient_scale` times its gradient if that is defined.
// `add_tiles(alpha_s, alpha_t, losses, U, h)` adds the sums over `pairs` pairs of an image.
template <typename AddTiles>
void tiled_loss(const Tensor& student, const Tensor& teacher, const Relation& relation, const AddTiles& add_tiles,
                double pairs, double gradient_scale, const Tensor& losses, const Tensor& gradient) {
  const int64_t images = student.size(0), pixels = student.size(1);
  const RowScales scale = scales_of(student, relation);
  const Tensor alpha_t = scales_of(teacher, relation).alpha;
  const bool need_grad = gradient.defined();
  const auto sums = student.options().dtype(accumulator(student.scalar_type()));
  const Tensor U = need_grad ? at::zeros_like(student, sums) : Tensor();
  const Tensor h = need_grad && relation.differentiates_norms() ? at::zeros({images, pixels}, sums) : Tensor();
  losses.zero_();
  add_tiles(scale.alpha, alpha_t, losses, U, h);
  losses.div_(pairs);
  if (!need_grad) return;
  correct(U, h, student.to(U.scalar_type()), scale);
  Tensor result = gradient;
  at::mul_out(result, U, at::scalar_tensor(gradient_scale, U.options()));
}

// Whether whole Gram matrices are faster than tiles. They are read and written several times, which is slow beyond the
// cache, but need no moments for the norms of rows. The factors are measured: bench/NOTES.md.
bool prefer_matrices(const Tensor& student, const Tensor& teacher, const Relation& relation) {
  constexpr int64_t MAX_PIXELS = 1024;  // memory grows with its square
  const int64_t pixels = student.size(1), elements = pixels * pixels;
  const int64_t channels_s = student.size(2), channels_t = teacher.size(2);
  const bool row = relation.normalize == Normalize::row;
  // the moments of as many channels are no smaller
  if (pixels > (row ? std::max({MAX_PIXELS, channels_s, channels_t}) : MAX_PIXELS)) return false;
  const int64_t cache = cache_bytes() / static_cast<int64_t>(elementSize(accumulator(student.scalar_type())));
  if (!row) return elements <= 2 * cache;
  static const int64_t gain = has_instructions("AVX512") ? 128 : 32;  // of an element of the moments
  return elements <= cache / 2 + gain * (channels_s * channels_s + channels_t * channels_t);
}

template <typename T>
void reduce(const double* losses, int64_t images, Reduction reduction, T* loss) {
  if (reduction == Reduction::none) {
    std::copy_n(losses, images, loss);
    return;
  }
  const double total = std::accumulate(losses, losses + images, 0.0);
  *loss = static_cast<T>(reduction == Reduction::mean ? total / static_cast<double>(images) : total);
}

// Returns the loss and the gradient that compute(losses, gradient) writes: the loss of each image (B,) in double, and
// the gradient if it is defined. It is not called for empty features.
template <typename Compute>
LossAndGradient loss_and_gradient(const Tensor& student, const Tensor& teacher, Reduction reduction, bool need_grad,
                                  const Compute& compute) {
  const c10::impl::ExcludeDispatchKeyGuard guard(AROUND_KERNELS);
  auto [loss, gradient] = empty_loss_and_gradient(student, reduction, need_grad);
  if (student.numel() == 0 || teacher.numel() == 0) return {loss.zero_(), gradient.zero_()};
  const int64_t images = student.size(0);
  const Tensor losses = at::empty({images}, student.options().dtype(at::kDouble));
  compute(losses, need_grad ? gradient : Tensor());
  if (loss.scalar_type() == at::kDouble)
    reduce(losses.const_data_ptr<double>(), images, reduction, loss.mutable_data_ptr<double>());
  else
    reduce(losses.const_data_ptr<double>(), images, reduction, loss.mutable_data_ptr<float>());
  return {loss, gradient};
}

}  // namespace

LossAndGradient relation_loss(const Tensor& student, const Tensor& teacher, const Relation& relation,
                              Reduction reduction, bool need_grad) {
  return loss_and_gradient(student, teacher, reduction, need_grad, [&](const Tensor& losses, const Tensor& gradient) {
    const Tensor q_s = widened(student), q_t = widened(teacher);
    const double pairs = static_cast<double>(student.size(1)) * static_cast<double>(student.size(1));
    double gradient_scale = 1 / pairs;
    if (reduction == Reduction::mean) gradient_scale /= static_cast<double>(student.size(0));
    if (prefer_matrices(q_s, q_t, relation))
      return relation_matrices(q_s, q_t, relation, gradient_scale, losses.mutable_data_ptr<double>(), gradient);
    const auto add_tiles = [&](const Tensor& alpha_s, const Tensor& alpha_t, const auto&... sums) {
      relation_tiles(q_s, q_t, alpha_s, alpha_t, relation, 0, sums...);
    };
    tiled_loss(q_s, q_t, relation, add_tiles, pairs, gradient_scale, losses, gradient);
  });
}

LossAndGradient sampled_loss(const Tensor& student, const Tensor& teacher, const Tensor& columns,
                             const Relation& relation, bool need_grad, int64_t tile) {
  const auto compute = [&](const Tensor& losses, const Tensor& gradient) {
    const Tensor q_s = by_pixel(student), q_t = by_pixel(teacher);
    const double pairs = 2 * static_cast<double>(student.size(1)) * static_cast<double>(columns.size(2));
    const auto add_tiles = [&](const Tensor& alpha_s, const Tensor& alpha_t, const auto&... sums) {
      const Pixels pixels = {q_s, q_t, alpha_s, alpha_t};
      indexed_tiles(pixels, pixels, columns, relation, true, tile, sums...);
    };
    tiled_loss(q_s, q_t, relation, add_tiles, pairs, 1 / pairs, losses, gradient);
  };
  return loss_and_gradient(student, teacher, Reduction::none, need_grad, compute);
}

}  // namespace srpkd::cpu
