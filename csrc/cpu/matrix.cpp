#include "matrix.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <exception>
#include <vector>

#include "instructions.h"

// The BLAS that torch is linked with. Weak: where torch hides it, ATen's product is used.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*,
                                  const int*);
}

// Of FBGEMM, which torch contains for most processors. Weak, as above.
namespace fbgemm {
template <typename T>
void transpose_simd(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride);
template <>
__attribute__((weak)) void transpose_simd(int64_t, int64_t, const float*, int64_t, float*, int64_t);
template <>
__attribute__((weak)) void transpose_simd(int64_t, int64_t, const uint16_t*, int64_t, uint16_t*, int64_t);
}  // namespace fbgemm

namespace srpkd::cpu {
namespace {

// Terms that a microkernel adds one after the other: rounding errors grow with their number.
constexpr int64_t DEPTH = 256;

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
void run(Gemm* gemm, const Matrix<const T>& left, const Matrix<const T>& right, const Matrix<T>& result, bool add) {
  if (!result.row_major()) return run(gemm, right.t(), left.t(), result.t(), add);
  if (gemm == nullptr) {
    at::Tensor sum = as_tensor(result);
    at::cpu::addmm_out(sum, sum, as_tensor(left), as_tensor(right), add ? 1 : 0);
    return;
  }
  const bool left_rows = left.row_major(), right_rows = right.row_major();
  const int m = static_cast<int>(result.columns), n = static_cast<int>(result.rows), k = static_cast<int>(left.columns);
  const int lda = leading_dimension(right_rows ? right : right.t());
  const int ldb = leading_dimension(left_rows ? left : left.t());
  const int ldc = leading_dimension(result);
  const T one = 1, beta = add ? 1 : 0;
  gemm(right_rows ? "N" : "T", left_rows ? "N" : "T", &m, &n, &k, &one, right.data, &lda, left.data, &ldb, &beta,
       result.data, &ldc);
}

template <typename T>
bool transpose_in_vectors(const Matrix<const T>& from, const Matrix<T>& to) {
  if (fbgemm::transpose_simd<T> == nullptr) return false;
  fbgemm::transpose_simd(from.rows, from.columns, from.data, from.row_stride, to.data, to.row_stride);
  return true;
}

#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__)
// oneDNN may not use an instruction set that the processor has: see its ONEDNN_MAX_CPU_ISA.
bool bfloat16_microkernels_work() {
  const std::vector<c10::BFloat16> ones(4, 1);
  std::vector<float> result(4, 0);
  try {
    multiply(Matrix<const c10::BFloat16>{ones.data(), 2, 2, 2, 1},
             Matrix<const Pair>{reinterpret_cast<const Pair*>(ones.data()), 1, 2, 2, 1},
             Matrix<float>{result.data(), 2, 2, 2, 1});
    release_microkernels();
  } catch (const std::exception&) {
    return false;
  }
  return result == std::vector<float>(4, 2);
}
#endif

}  // namespace

template <>
bool has_microkernels<float>() {
#if defined(CPUBLAS_BRGEMM_F32F32F32) && defined(__x86_64__)
  static const bool supported = at::hasMKLDNN() && (has_instructions("AVX2") || has_instructions("AVX512"));
  return supported && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

template <>
bool has_microkernels<double>() {
  return false;
}

bool has_bfloat16_microkernels() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__)
  static const bool supported =
      has_instructions("AVX512") && __builtin_cpu_supports("avx512bf16") && bfloat16_microkernels_work();
  return supported && has_microkernels<float>();
#else
  return false;
#endif
}

bool may_round_floats() { return sgemm_ == nullptr && !has_microkernels<float>(); }

void multiply(Matrix<const float> left, Matrix<const float> right, Matrix<float> result, bool add) {
  if (!has_microkernels<float>() || !left.row_major() || !right.row_major() || !result.row_major())
    return run<float>(sgemm_, left, right, result, add);
  for (int64_t done = 0; done < left.columns; done += DEPTH) {
    const int64_t depth = std::min(DEPTH, left.columns - done);
    at::native::cpublas::brgemm(left.rows, right.columns, depth, leading_dimension(left), leading_dimension(right),
                                leading_dimension(result), add || done > 0, left.data + done,
                                right.data + done * right.row_stride, result.data, false);
  }
}

void multiply(Matrix<const double> left, Matrix<const double> right, Matrix<double> result, bool add) {
  run<double>(dgemm_, left, right, result, add);
}

void multiply(Matrix<const c10::BFloat16> left, Matrix<const Pair> right, Matrix<float> result, bool add) {
  for (int64_t done = 0; done < left.columns; done += DEPTH) {
    const int64_t depth = std::min(DEPTH, left.columns - done);
    at::native::cpublas::brgemm(left.rows, right.columns, depth, leading_dimension(left), leading_dimension(right),
                                leading_dimension(result), add || done > 0, left.data + done,
                                reinterpret_cast<const c10::BFloat16*>(right.data + done / 2 * right.row_stride),
                                result.data, true);
  }
}

bool transpose(Matrix<const float> from, Matrix<float> to) { return transpose_in_vectors(from, to); }
bool transpose(Matrix<const uint16_t> from, Matrix<uint16_t> to) { return transpose_in_vectors(from, to); }

void release_microkernels() { at::native::cpublas::brgemm_release(); }

}  // namespace srpkd::cpu
