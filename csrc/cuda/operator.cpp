// The operators on an NVIDIA GPU: srpkd::relation_loss_forward, the whole loss, and srpkd::relation_tiles, the tiles
// alone.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdlib>
#include <optional>
#include <string_view>

#include "../common/arguments.h"
#include "choose_kernel.h"
#include "closed_form/launch.h"
#include "inputs.h"
#include "launch_loss.h"

namespace srpkd::cuda {
namespace {

// --- the whole loss --------------------------------------------------------------------------------------------------

// Returns whether an environment variable is 1. meaning: what the message of an error says of 1.
bool is_set(const char* name, bool by_default, const char* meaning) {
  const char* value = std::getenv(name);
  if (!value) return by_default;
  const std::string_view setting = value;
  TORCH_CHECK_VALUE(setting == "0" || setting == "1", name, "=\"", setting, "\": expected 1 (", meaning, ") or 0");
  return setting == "1";
}

Launches launches_on(const Device& device) {
  Launches launches{c10::cuda::getCurrentCUDAStream()};
  launches.overlap = is_set("SRPKD_CUDA_OVERLAP", false, "kernels of a call start while the one before them ends");
  if (is_set("SRPKD_CUDA_TOGETHER", true, "the kernels of a small call share launches") && device.cooperates)
    launches.together = device.multiprocessors;
  return launches;
}

// Plans a loss by make(workspace), and calls launch(plan, a value of the features' element type).
template <class MakePlan, class LaunchPlan>
void plan_and_launch(const Tensor& student, MakePlan make, LaunchPlan launch) {
  Workspace size{nullptr};
  check_grid(student, make(size).largest_grid);
  const Tensor memory = at::empty({size.bytes}, student.options().dtype(at::kByte));
  Workspace workspace{static_cast<char*>(memory.mutable_data_ptr())};
  const auto plan = make(workspace);
  if (student.scalar_type() == at::kBFloat16)
    launch(plan, BFloat16{});
  else if (student.scalar_type() == at::kHalf)
    launch(plan, Half{});
  else
    launch(plan, 0.f);
}

LossAndGradient relation_loss_forward(const Tensor& student, const Tensor& teacher, std::string_view normalize,
                                      std::string_view distance, double delta, double eps, bool rectify,
                                      bool detach_norms, std::string_view reduction, std::string_view method,
                                      bool need_grad) {
  LossArguments a{};
  a.relation = parse_relation(normalize, distance, delta, eps, rectify, detach_norms);
  a.reduction = parse_reduction(reduction), a.need_grad = need_grad;
  const Method chosen = parse_method(method, a.relation);
  TORCH_CHECK_NOT_IMPLEMENTED(
      chosen == Method::tiles || a.relation.normalize != Normalize::row || !a.relation.detach_norms || !need_grad,
      "method=\"closed_form\" does not support normalize=\"row\" with detach_norms on a GPU: use method=\"tiles\", or "
      "backend='closed_form'");
  check_features(student, teacher);
  check_sizes(student), check_sizes(teacher);
  if (chosen == Method::closed_form || a.relation.normalize == Normalize::row)
    check_moments(student), check_moments(teacher);
  a.precision = precision_of(student.scalar_type());
  const c10::cuda::CUDAGuard guard(student.device());
  auto [loss, gradient] = empty_loss_and_gradient(student, a.reduction, need_grad);
  if (!student.numel() || !teacher.numel()) return {loss.zero_(), gradient.zero_()};

  Tensor q_s = student, q_t = teacher;
  a.pixels_adjacent = unify_layouts(q_s, q_t);
  a.features[TEACHER] = features_of(q_t, {}, a.pixels_adjacent);
  a.features[STUDENT] = features_of(q_s, {}, a.pixels_adjacent);
  a.element_bytes = static_cast<int>(student.element_size());
  a.images = static_cast<int>(student.size(0)), a.pixels = static_cast<int>(student.size(1));
  a.loss = loss.mutable_data_ptr<float>();
  if (need_grad) {
    a.gradient = gradient.mutable_data_ptr();
    for (int i = 0; i < 3; ++i) a.gradient_strides[i] = gradient.stride(i);
  }
  const Device& device = device_of(guard.current_device().index());
  Launches launches = launches_on(device);
  if (chosen == Method::closed_form) {
    plan_and_launch(
        student, [&](Workspace& workspace) { return closed_form::make_plan(a, device.multiprocessors, workspace); },
        [&](const auto& plan, auto element) {
          C10_CUDA_CHECK(closed_form::loss<decltype(element)>(plan, a.pixels_adjacent, launches));
        });
    return {loss, gradient};
  }
  const auto run_tiles = [&](auto make) {
    plan_and_launch(
        student, [&](Workspace& workspace) { return make(a, device, workspace); },
        [&](const auto& plan, auto element) { C10_CUDA_CHECK(launch_loss<decltype(element)>(plan, a, launches)); });
  };
  if (choose_kernel(a, device) == Kernel::sm90) {
    run_tiles(make_sm90_plan);
    return {loss, gradient};
  }
  Tensor tiles_s = q_s, tiles_t = q_t;
  if (student.scalar_type() == at::kFloat && a.precision == Precision::bf16) {
    tiles_s = q_s.to(at::kBFloat16), tiles_t = q_t.to(at::kBFloat16);
    make_adjacent(tiles_s, a.pixels_adjacent), make_adjacent(tiles_t, a.pixels_adjacent);
  }
  a.tile_features[TEACHER] = features_of(tiles_t, {}, a.pixels_adjacent);
  a.tile_features[STUDENT] = features_of(tiles_s, {}, a.pixels_adjacent);
  run_tiles(make_plan);
  return {loss, gradient};
}

// --- the tiles alone -------------------------------------------------------------------------------------------------

Outputs relation_tiles(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& alpha_s,
                       const std::optional<Tensor>& alpha_t, std::string_view normalize, std::string_view distance,
                       double delta, bool rectify, bool need_grad, int64_t) {
  const Normalize kind = parse_normalize(normalize);
  sm80::Params p{};
  p.distance = parse_distance(distance), p.delta = static_cast<float>(delta);
  p.row = kind == Normalize::row, p.zero_diagonal = kind == Normalize::cosine, p.rectify = rectify;
  check_tensors(student, teacher, alpha_s, alpha_t, normalize);
  check_sizes(student), check_sizes(teacher);
  const Precision precision = precision_of(student.scalar_type());
  const c10::cuda::CUDAGuard guard(student.device());
  if (!student.numel() || !teacher.numel()) return zero_outputs(student, normalize, need_grad);
  const int64_t images = student.size(0), pixels = student.size(1), channels = student.size(2);
  const bool need_h = need_grad && kind != Normalize::none;
  const auto sums = student.options().dtype(at::kFloat), double_sums = student.options().dtype(at::kDouble);

  Tensor q_s = student, q_t = teacher;
  if (precision == Precision::bf16) q_s = q_s.to(at::kBFloat16), q_t = q_t.to(at::kBFloat16);
  const bool pixels_adjacent = unify_layouts(q_s, q_t);
  const auto scale = [](const std::optional<Tensor>& alpha) {
    return alpha ? alpha->to(at::kFloat).contiguous() : Tensor();
  };
  const Tensor scale_s = scale(alpha_s), scale_t = scale(alpha_t);

  p.features[TEACHER] = features_of(q_t, scale_t, pixels_adjacent);
  p.features[STUDENT] = features_of(q_s, scale_s, pixels_adjacent);
  p.images = static_cast<int>(images), p.pixels = static_cast<int>(pixels);
  const int u_channels = sm80::plan(p, precision, need_grad, device_of(guard.current_device().index()));
  check_grid(student, images * p.blocks * p.channel_splits);

  const bool split = p.splits > 1;
  Tensor U = need_grad ? at::empty_like(student, sums) : at::empty({0}, sums), U_of_splits = U;
  Tensor h = at::empty({need_h ? images : 0, pixels}, sums), h_of_splits = h;
  Tensor loss_of_blocks = at::empty({images, p.splits * p.blocks}, double_sums);
  if (split && need_grad)
    U_of_splits = pixels_adjacent ? at::empty({p.splits, images, channels, pixels}, sums).mT()
                                  : at::empty({p.splits, images, pixels, channels}, sums);
  if (split && need_h) h_of_splits = at::empty({p.splits, images, pixels}, sums);
  p.loss = loss_of_blocks.mutable_data_ptr<double>();
  if (need_h) p.h = h_of_splits.mutable_data_ptr<float>();
  if (need_grad) {
    p.U = U_of_splits.mutable_data_ptr<float>();
    for (int i = split ? 0 : 1; i < 4; ++i) p.U_strides[i] = U_of_splits.stride(split ? i : i - 1);
  }
  Launches launches{c10::cuda::getCurrentCUDAStream()};
  C10_CUDA_CHECK(sm80::launch(p, precision, pixels_adjacent, u_channels, launches));

  if (split && need_grad) at::sum_out(U, U_of_splits, 0);
  if (split && need_h) at::sum_out(h, h_of_splits, 0);
  return {at::sum(loss_of_blocks, 1), U, need_h ? h : at::empty({0}, sums)};
}

}  // namespace

TORCH_LIBRARY_IMPL(srpkd, CUDA, m) {
  m.impl("relation_loss_forward", relation_loss_forward);
  m.impl("relation_tiles", relation_tiles);
}

}  // namespace srpkd::cuda
