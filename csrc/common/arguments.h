// What the implementations of the operators for CPU, CUDA and meta tensors share: argument checks and output tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include "relation.h"

namespace srpkd {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of relation_tiles: loss, U, h
using LossAndGradient = std::tuple<at::Tensor, at::Tensor>;

inline Normalize parse_normalize(std::string_view name) {
  TORCH_CHECK_VALUE(name == "row" || name == "cosine" || name == "none",
                    "expected normalize=\"row\", \"cosine\" or \"none\", received \"", name, "\"");
  return name == "row" ? Normalize::row : name == "cosine" ? Normalize::cosine : Normalize::none;
}

inline Distance parse_distance(std::string_view name) {
  TORCH_CHECK_VALUE(name == "l1" || name == "l2" || name == "huber",
                    "expected distance=\"l1\", \"l2\" or \"huber\", received \"", name, "\"");
  return name == "l1" ? Distance::l1 : name == "l2" ? Distance::l2 : Distance::huber;
}

inline Reduction parse_reduction(std::string_view name) {
  TORCH_CHECK_VALUE(name == "mean" || name == "sum" || name == "none",
                    "expected reduction=\"mean\", \"sum\" or \"none\", received \"", name, "\"");
  return name == "mean" ? Reduction::mean : name == "sum" ? Reduction::sum : Reduction::none;
}

inline Relation parse_relation(std::string_view normalize, std::string_view distance, double delta, double eps,
                               bool rectify, bool detach_norms) {
  return {parse_normalize(normalize), parse_distance(distance), delta, eps, rectify, detach_norms};
}

inline Method parse_method(std::string_view name, const Relation& relation) {
  TORCH_CHECK_VALUE(name == "tiles" || name == "closed_form",
                    "expected method=\"tiles\" or \"closed_form\", received \"", name, "\"");
  TORCH_CHECK_VALUE(name == "tiles" || (relation.distance == Distance::l2 && !relation.rectify),
                    "method=\"closed_form\" supports distance=\"l2\" without rectify only: use method=\"tiles\"");
  return name == "tiles" ? Method::tiles : Method::closed_form;
}

// Checks shapes, dtypes and devices of features (B, N, C_s), (B, N, C_t).
inline void check_features(const at::Tensor& student, const at::Tensor& teacher) {
  TORCH_CHECK_VALUE(student.dim() == 3 && teacher.dim() == 3 && student.sym_size(0) == teacher.sym_size(0) &&
                        student.sym_size(1) == teacher.sym_size(1),
                    "expected student (B, N, C_s) and teacher (B, N, C_t), received ", student.sym_sizes(), " and ",
                    teacher.sym_sizes());
  TORCH_CHECK_TYPE(student.scalar_type() == teacher.scalar_type() && at::isFloatingType(student.scalar_type()),
                   "expected student and teacher of one floating-point dtype, received ", student.scalar_type(),
                   " and ", teacher.scalar_type());
  TORCH_CHECK_VALUE(student.device() == teacher.device(), "expected student and teacher on one device, received ",
                    student.device(), " and ", teacher.device());
}

// Checks the tensor arguments of relation_tiles: the alphas are present unless normalize is none.
inline void check_tensors(const at::Tensor& student, const at::Tensor& teacher,
                          const std::optional<at::Tensor>& alpha_student,
                          const std::optional<at::Tensor>& alpha_teacher, std::string_view normalize) {
  check_features(student, teacher);
  for (const auto& [name, alpha] :
       {std::pair("alpha_student", alpha_student), std::pair("alpha_teacher", alpha_teacher)}) {
    TORCH_CHECK_VALUE(alpha.has_value() == (normalize != "none"), "expected ", name, alpha ? "=None" : "",
                      " with normalize=\"", normalize, "\", received ", alpha ? "a tensor" : "None");
    TORCH_CHECK_VALUE(!alpha || alpha->sizes() == student.sizes().slice(0, 2), "expected ", name,
                      " of shape (B, N) = ", student.sizes().slice(0, 2), ", received ", alpha->sizes());
    TORCH_CHECK_VALUE(!alpha || alpha->device() == student.device(), "expected ", name, " on ", student.device(),
                      ", received ", alpha->device());
  }
}

// The dtype of sums.
inline at::ScalarType accumulator(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// The dtype of a stored gradient: that of float16 features would underflow before the loss scale is applied.
inline at::ScalarType gradient_dtype(at::ScalarType dtype) { return dtype == at::kHalf ? at::kFloat : dtype; }

// Returns the outputs of relation_tiles as zeros: loss (B,), U (B, N, C_s) and h (B, N). U and h are empty where they
// are not computed.
inline Outputs zero_outputs(const at::Tensor& student, std::string_view normalize, bool need_grad) {
  const bool need_h = need_grad && normalize != "none";
  const auto sums = student.options().dtype(accumulator(student.scalar_type()));
  return {at::zeros({student.size(0)}, student.options().dtype(at::kDouble)),
          need_grad ? at::zeros_like(student, sums) : at::empty({0}, sums),
          need_h ? at::zeros({student.size(0), student.size(1)}, sums) : at::empty({0}, sums)};
}

// Returns the outputs of relation_loss_forward without values: loss () or (B,), and the gradient, with the shape and
// strides of the student, or of shape (0,) without need_grad.
inline LossAndGradient empty_loss_and_gradient(const at::Tensor& student, Reduction reduction, bool need_grad) {
  const auto of_loss = student.options().dtype(accumulator(student.scalar_type()));
  const auto of_gradient = student.options().dtype(gradient_dtype(student.scalar_type()));
  return {reduction == Reduction::none ? at::empty_symint({student.sym_size(0)}, of_loss) : at::empty({}, of_loss),
          need_grad ? at::empty_like(student, of_gradient) : at::empty({0}, of_gradient)};
}

}  // namespace srpkd
