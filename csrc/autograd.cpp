// srpkd::relation_loss: from features as networks return them to a loss that is differentiable in the student.
//
// The gradient is computed together with the loss, because both need the same tiles. Backward multiplies it with the
// upstream gradient, out of place, so that it can run twice.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string_view>

#include "common/arguments.h"

namespace srpkd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The arguments of srpkd::relation_loss beside the features.
struct Options {
  std::string_view normalize, distance;
  double delta, eps;
  bool rectify, detach_norms;
  std::string_view reduction, layout, scope, method;
};

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool is_batch(const Tensor& features, const Options& options) {
  return features.dim() == (options.layout == "nlc" ? 3 : 4);
}

// Returns features as (B, N, C), or (1, B N, C) if the batch is the scope: a view where the strides allow it.
Tensor as_pixels(const Tensor& features, at::ScalarType dtype, const Options& options) {
  Tensor x = is_batch(features, options) ? features : features.unsqueeze(0);
  if (options.layout == "nchw")
    x = x.flatten(2).transpose(1, 2);
  else if (options.layout == "nhwc")
    x = x.flatten(1, 2);
  if (x.scalar_type() != dtype) x = x.to(dtype);
  return options.scope == "batch" ? x.reshape_symint({1, -1, x.sym_size(2)}) : x;
}

// The inverse of as_pixels: a view of the gradient with the sizes of the features.
Tensor as_features(const Tensor& gradient, c10::SymIntArrayRef sizes, bool by_channel) {
  // where nothing changes, a view would only take time
  const auto viewed = [](const Tensor& x, c10::SymIntArrayRef shape) {
    return x.sym_sizes() == shape ? x : x.view_symint(shape);
  };
  if (!by_channel) return viewed(gradient, sizes);
  const size_t dims = sizes.size();
  const c10::SymInt images = dims == 4 ? sizes[0] : c10::SymInt(1), pixels = sizes[dims - 2] * sizes[dims - 1];
  return viewed(gradient, {images, pixels, gradient.sym_size(2)}).transpose(1, 2).view_symint(sizes);
}

void check_options(const Tensor& student, const Tensor& teacher, const Options& options) {
  TORCH_CHECK_VALUE(options.layout == "nchw" || options.layout == "nhwc" || options.layout == "nlc",
                    "expected layout=\"nchw\", \"nhwc\" or \"nlc\", received \"", options.layout, "\"");
  TORCH_CHECK_VALUE(options.scope == "image" || options.scope == "batch",
                    "expected scope=\"image\" or \"batch\", received \"", options.scope, "\"");
  const int64_t dims = options.layout == "nlc" ? 3 : 4;
  TORCH_CHECK_VALUE((student.dim() == dims || student.dim() == dims - 1) && teacher.dim() == student.dim(),
                    "expected features of ", dims, " or ", dims - 1, " dimensions with layout=\"", options.layout,
                    "\", received ", student.sym_sizes(), " and ", teacher.sym_sizes());
}

LossAndGradient loss_and_gradient(const Tensor& student, const Tensor& teacher, const Options& options,
                                  bool need_grad) {
  static const auto forward =
      find_operator<LossAndGradient(const Tensor&, const Tensor&, std::string_view, std::string_view, double, double,
                                    bool, bool, std::string_view, std::string_view, bool)>(
          "srpkd::relation_loss_forward");
  check_options(student, teacher, options);
  const at::ScalarType dtype = c10::promoteTypes(student.scalar_type(), teacher.scalar_type());
  auto result = forward.call(as_pixels(student, dtype, options), as_pixels(teacher, dtype, options), options.normalize,
                             options.distance, options.delta, options.eps, options.rectify, options.detach_norms,
                             options.reduction, options.method, need_grad);
  Tensor& loss = std::get<0>(result);
  if (options.reduction == "none" && !is_batch(student, options)) loss = loss.squeeze(0);
  return result;
}

Tensor multiply(const Tensor& gradient, const Tensor& grad_loss, at::ScalarType dtype) {
  static const auto backward =
      find_operator<Tensor(const Tensor&, const Tensor&, at::ScalarType)>("srpkd::relation_loss_backward");
  return backward.call(gradient, grad_loss, dtype);
}

// --- autograd -------------------------------------------------------------------------------------------------------

// The gradient is an output too: if backward is differentiated, it leads to RelationLossBackward, which raises.
struct RelationLoss : torch::autograd::Function<RelationLoss> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const Tensor& student, const Tensor& teacher,
                               const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, gradient] = loss_and_gradient(student, teacher, options, true);
    context->saved_data["dtype"] = student.scalar_type();
    context->saved_data["sizes"] = student.sym_sizes();
    context->saved_data["by_channel"] = options.layout == "nchw";
    context->save_for_backward({gradient});
    context->set_materialize_grads(false);
    return {loss, gradient};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    Tensor result;
    if (grads[0].defined()) {
      const auto sizes = context->saved_data["sizes"].toSymIntVector();
      result = multiply(context->get_saved_variables()[0], grads[0], context->saved_data["dtype"].toScalarType());
      result = as_features(result, sizes, context->saved_data["by_channel"].toBool());
    }
    return {result, Tensor(), Tensor()};
  }
};

struct RelationLossBackward : torch::autograd::Function<RelationLossBackward> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext*, const Tensor& gradient, const Tensor& grad_loss, at::ScalarType dtype) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return multiply(gradient, grad_loss, dtype);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "the relation loss does not support double backward: use backend='reference', which does, or exclude "
                "the loss from what is differentiated twice");
  }
};

bool needs_grad(const Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }

Tensor relation_loss_autograd(const Tensor& student, const Tensor& teacher, std::string_view normalize,
                              std::string_view distance, double delta, double eps, bool rectify, bool detach_norms,
                              std::string_view reduction, std::string_view layout, std::string_view scope,
                              std::string_view method) {
  TORCH_CHECK_NOT_IMPLEMENTED(!student._fw_grad(0).defined(),
                              "the relation loss does not support forward-mode differentiation: use "
                              "backend='reference', which does");
  const Options options{normalize, distance, delta, eps, rectify, detach_norms, reduction, layout, scope, method};
  if (needs_grad(student)) return RelationLoss::apply(student, teacher, options)[0];
  const at::AutoDispatchBelowADInplaceOrView guard;
  return std::get<0>(loss_and_gradient(student, teacher, options, false));
}

// Where autograd is off, as in inference mode.
Tensor relation_loss(const Tensor& student, const Tensor& teacher, std::string_view normalize,
                     std::string_view distance, double delta, double eps, bool rectify, bool detach_norms,
                     std::string_view reduction, std::string_view layout, std::string_view scope,
                     std::string_view method) {
  const Options options{normalize, distance, delta, eps, rectify, detach_norms, reduction, layout, scope, method};
  return std::get<0>(loss_and_gradient(student, teacher, options, false));
}

Tensor relation_loss_backward_autograd(const Tensor& gradient, const Tensor& grad_loss, at::ScalarType dtype) {
  if (needs_grad(gradient) || needs_grad(grad_loss)) return RelationLossBackward::apply(gradient, grad_loss, dtype);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return multiply(gradient, grad_loss, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(srpkd, CompositeExplicitAutograd, m) { m.impl("relation_loss", relation_loss); }
TORCH_LIBRARY_IMPL(srpkd, Autograd, m) {
  m.impl("relation_loss", relation_loss_autograd);
  m.impl("relation_loss_backward", relation_loss_backward_autograd);
}

}  // namespace srpkd
