#include "matrix.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>

// The BLAS that torch is linked with. Weak: where torch hides it, ATen's product is used.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*,
                                  const int*);
}

namespace srpkd::cpu {
namespace {

template <typename T>
int leading_dimension(const Matrix<T>& row_major) {  // BLAS checks it even where one row makes it meaningless
  return static_cast<int>(row_major.rows == 1 ? std::max<int64_t>(row_major.columns, 1) : row_major.row_stride);
}

template <typename T>
at::Tensor as_tensor(const Matrix<T>& matrix) {
  using Value = std::remove_const_t<T>;
  return at::from_blob(const_cast<Value*>(matrix.data), {matrix.rows, matrix.columns},
                       {matrix.row_stride, matrix.column_stride}, c10::CppTypeToScalarType<Value>::value);
}

// BLAS takes column-major matrices: of row-major ones, it computes the transposed product of the transposed matrices.
template <typename T, typename Gemm>
void run(Gemm* gemm, const Matrix<const T>& left, const Matrix<const T>& right, T scale, const Matrix<T>& result) {
  if (!result.row_major()) return run(gemm, right.t(), left.t(), scale, result.t());
  if (gemm == nullptr) {
    at::Tensor product = as_tensor(result);
    at::cpu::mm_out(product, as_tensor(left), as_tensor(right));
    product.mul_(scale);
    return;
  }
  const bool left_rows = left.row_major(), right_rows = right.row_major();
  const int m = static_cast<int>(result.columns), n = static_cast<int>(result.rows), k = static_cast<int>(left.columns);
  const int lda = leading_dimension(right_rows ? right : right.t());
  const int ldb = leading_dimension(left_rows ? left : left.t());
  const int ldc = leading_dimension(result);
  const T zero = 0;
  gemm(right_rows ? "N" : "T", left_rows ? "N" : "T", &m, &n, &k, &scale, right.data, &lda, left.data, &ldb, &zero,
       result.data, &ldc);
}

}  // namespace

void multiply(Matrix<const float> left, Matrix<const float> right, float scale, Matrix<float> result) {
  run<float>(sgemm_, left, right, scale, result);
}

void multiply(Matrix<const double> left, Matrix<const double> right, double scale, Matrix<double> result) {
  run<double>(dgemm_, left, right, scale, result);
}

}  // namespace srpkd::cpu
