// The whole loss on the CPU. The formulas around the tiles are those of kernels/formulas.py.
#include "loss.h"

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "../common/arguments.h"
#include "relation_matrices.h"
#include "relation_tiles.h"

namespace srpkd::cpu {
namespace {

using at::Tensor;

// --- the formulas around the tiles ----------------------------------------------------------------------------------

// Returns the largest power of two below the root of M's largest element (B, 1, 1).
Tensor power_of_two_scale(const Tensor& moment) {
  const double tiny =
      moment.scalar_type() == at::kDouble ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  return moment.diagonal(0, 1, 2).amax(1).clamp_min(tiny).log2().div(2).floor().exp2().view({-1, 1, 1});
}

// Returns alpha = 1 / norm: 0 for a zero-norm pixel, NaN if the norm is NaN or overflows.
Tensor inverse(const Tensor& norm, double eps) {
  return at::where(norm <= eps, at::zeros({}, norm.options()), norm.reciprocal() + norm * 0);
}

// Whether float32 products are not rounded to fewer bits, which is too coarse for scales.
bool products_are_exact() {
  try {
    return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST;
  } catch (const c10::Error&) {  // it is set for each backend, with torch.backends.mkldnn.matmul.fp32_precision
    return false;
  }
}

struct Scale {
  Tensor alpha, moment;  // (B, N) and for row M = Q^T Q (B, C, C); undefined if normalize is none
};

// q_i^T M q_i = q_i^T M' q_i + N (m . q_i)^2, where m is the mean of the features and M' the moment of q - m: neither
// term is negative, so pixels that do not share a large common mean keep the digits that would cancel in q_i^T M q_i.
Scale row_scale(const Tensor& features, double eps) {
  const auto count = static_cast<double>(features.size(1));
  const Tensor mean = features.sum({1}, true) / count;
  const Tensor centred = features - mean;
  Tensor moment = at::bmm(centred.mT(), centred);
  const Tensor whole = at::baddbmm(moment, mean.mT(), mean, 1, count), size = power_of_two_scale(whole);
  moment.div_(size.square());
  // the product has the layout of the features: reading across strides costs as much as the product itself
  const bool by_channel = features.stride(2) > features.stride(1);
  Tensor product = by_channel ? at::bmm(moment, features.mT()).mT() : at::bmm(features, moment);
  Tensor square = product.mul_(features).sum({2});
  square.add_(at::bmm(features, mean.mT() / size).squeeze(2).square_(), count).clamp_min_(0);
  return {inverse(square.sqrt_() * size.squeeze(2), eps), whole};
}

Scale scale_of(const Tensor& features, const Relation& relation) {
  if (relation.normalize == Normalize::none) return {};
  if (relation.normalize == Normalize::cosine) return {inverse(features.square().sum({2}).sqrt_(), relation.eps), {}};
  if (products_are_exact()) return row_scale(features, relation.eps);
  const auto [alpha, moment] = row_scale(features.to(at::kDouble), relation.eps);
  return {alpha.to(features.scalar_type()), moment.to(features.scalar_type())};
}

// Overwrites U with N^2 dL/dQ, which is U itself if h is undefined; else with w_i = h_i alpha_i^2,
//     cosine    U_i - w_i q_i
//     row       U_i - w_i M q_i - M_w q_i,  M_w = Q^T diag(w) Q
void correct(const Tensor& U, const Tensor& h, const Tensor& features, const Scale& scale) {
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
void tiled_loss(const Tensor& student, const Tensor& teacher, const Relation& relation, double gradient_scale,
                const Tensor& losses, const Tensor& gradient) {
  const int64_t images = student.size(0), pixels = student.size(1);
  const at::ScalarType sums = accumulator(student.scalar_type());
  const Tensor q_s = student.to(sums), q_t = teacher.to(sums);
  const Scale scale = scale_of(q_s, relation);
  const Tensor alpha_t = scale_of(q_t, relation).alpha;
  const bool need_grad = gradient.defined();
  const Tensor U = need_grad ? at::zeros_like(q_s) : Tensor();
  const Tensor h = need_grad && relation.differentiates_norms() ? at::zeros({images, pixels}, q_s.options()) : Tensor();
  losses.zero_();
  relation_tiles(student, teacher, scale.alpha, alpha_t, relation, 0, losses, U, h);
  losses.div_(static_cast<double>(pixels) * static_cast<double>(pixels));
  if (!need_grad) return;
  correct(U, h, q_s, scale);
  Tensor result = gradient;
  at::mul_out(result, U, at::scalar_tensor(gradient_scale, U.options()));
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

}  // namespace

std::tuple<Tensor, Tensor> relation_loss(const Tensor& student, const Tensor& teacher, const Relation& relation,
                                         Reduction reduction, bool need_grad) {
  // autocast would round the products of the formulas
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  auto [loss, gradient] = empty_loss_and_gradient(student, reduction, need_grad);
  if (student.numel() == 0 || teacher.numel() == 0) return {loss.zero_(), gradient.zero_()};
  const int64_t images = student.size(0), pixels = student.size(1);
  double gradient_scale = 1 / (static_cast<double>(pixels) * static_cast<double>(pixels));
  if (reduction == Reduction::mean) gradient_scale /= static_cast<double>(images);

  const Tensor losses = at::empty({images}, student.options().dtype(at::kDouble));
  const Tensor written = need_grad ? gradient : Tensor();
  if (fit_in_cache(pixels))
    relation_matrices(student, teacher, relation, gradient_scale, losses.mutable_data_ptr<double>(), written);
  else
    tiled_loss(student, teacher, relation, gradient_scale, losses, written);

  if (loss.scalar_type() == at::kDouble)
    reduce(losses.const_data_ptr<double>(), images, reduction, loss.mutable_data_ptr<double>());
  else
    reduce(losses.const_data_ptr<double>(), images, reduction, loss.mutable_data_ptr<float>());
  return {loss, gradient};
}

}  // namespace srpkd::cpu
