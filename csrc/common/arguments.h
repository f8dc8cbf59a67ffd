// What the CPU and the CUDA implementation of srpkd::relation_tiles share: argument checks and output tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "relation.h"

namespace srpkd {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // loss, U, h

inline Normalize parse_normalize(const std::string& name) {
  TORCH_CHECK_VALUE(name == "row" || name == "cosine" || name == "none",
                    "expected normalize=\"row\", \"cosine\" or \"none\", received \"", name, "\"");
  return name == "row" ? Normalize::row : name == "cosine" ? Normalize::cosine : Normalize::none;
}

inline Distance parse_distance(const std::string& name) {
  TORCH_CHECK_VALUE(name == "l1" || name == "l2" || name == "huber",
                    "expected distance=\"l1\", \"l2\" or \"huber\", received \"", name, "\"");
  return name == "l1" ? Distance::l1 : name == "l2" ? Distance::l2 : Distance::huber;
}

// Checks shapes, dtypes and devices of the tensor arguments, and that the alphas are present unless normalize is none.
inline void check_tensors(const at::Tensor& student, const at::Tensor& teacher,
                          const std::optional<at::Tensor>& alpha_student,
                          const std::optional<at::Tensor>& alpha_teacher, const std::string& normalize) {
  TORCH_CHECK_VALUE(student.dim() == 3 && teacher.dim() == 3 && student.size(0) == teacher.size(0) &&
                        student.size(1) == teacher.size(1),
                    "expected student (B, N, C_s) and teacher (B, N, C_t), received ", student.sizes(), " and ",
                    teacher.sizes());
  TORCH_CHECK_TYPE(student.scalar_type() == teacher.scalar_type() && at::isFloatingType(student.scalar_type()),
                   "expected student and teacher of one floating-point dtype, received ", student.scalar_type(),
                   " and ", teacher.scalar_type());
  TORCH_CHECK_VALUE(student.device() == teacher.device(), "expected student and teacher on one device, received ",
                    student.device(), " and ", teacher.device());
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

// Returns zeros: loss (B,), U (B, N, C_s) and h (B, N). U and h are empty where they are not computed.
inline Outputs zero_outputs(const at::Tensor& student, const std::string& normalize, bool need_grad) {
  const bool need_h = need_grad && normalize != "none";
  const auto sums = student.options().dtype(student.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return {at::zeros_symint({student.sym_size(0)}, student.options().dtype(at::kDouble)),
          need_grad ? at::zeros_like(student, sums) : at::empty({0}, sums),
          need_h ? at::zeros_symint({student.sym_size(0), student.sym_size(1)}, sums) : at::empty({0}, sums)};
}

}  // namespace srpkd
