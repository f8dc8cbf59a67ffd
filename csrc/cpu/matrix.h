// Products of strided matrices, without the cost of tensors and of the dispatcher: small products take less time than
// either.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace srpkd::cpu {

// A view of a matrix in memory that it does not own.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix t() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix row_range(int64_t begin, int64_t count) const {
    return {data + begin * row_stride, count, columns, row_stride, column_stride};
  }
  Matrix column_range(int64_t begin, int64_t count) const { return t().row_range(begin, count).t(); }

  bool row_major() const {
    return (column_stride == 1 || columns == 1) && (row_stride >= columns || rows == 1) &&
           row_stride <= std::numeric_limits<int>::max();
  }
  // Whether multiply() can read or write it in place.
  bool is_blas() const { return row_major() || t().row_major(); }

  // The same bits as elements of another type of the same size.
  template <typename U>
  Matrix<U> reinterpreted() const {
    static_assert(sizeof(U) == sizeof(T));
    return {reinterpret_cast<U*>(data), rows, columns, row_stride, column_stride};
  }

  template <typename U, typename = std::enable_if_t<std::is_same_v<U, const T>>>
  operator Matrix<U>() const {
    return {data, rows, columns, row_stride, column_stride};
  }
};

// Whether products of row-major matrices are much faster than others on this processor: those of oneDNN's microkernels,
// which torch contains. They accept no transposed operands.
template <typename T>
bool has_microkernels();
// Whether oneDNN multiplies bfloat16 numbers, with float sums, faster than floats.
bool has_bfloat16_microkernels();

// Whether multiply() rounds floats to fewer bits where torch.set_float32_matmul_precision() allows that.
bool may_round_floats();

// result = left right, or with `add` result += left right. All are Matrix::is_blas().
void multiply(Matrix<const float> left, Matrix<const float> right, Matrix<float> result, bool add = false);
void multiply(Matrix<const double> left, Matrix<const double> right, Matrix<double> result, bool add = false);

// Two adjacent elements of a row of bfloat16 numbers; in the right operand of a product, of a column.
struct Pair {
  c10::BFloat16 first, second;
};

// The same for row-major matrices, where `right` has half as many rows as `left` has columns. Only if
// has_bfloat16_microkernels().
void multiply(Matrix<const c10::BFloat16> left, Matrix<const Pair> right, Matrix<float> result, bool add = false);
// Each thread calls this after such products: they leave AMX configured, which other users of AMX do not expect.
void release_microkernels();

// Calls f(element of `from`, element of `to`) for each element of `from`; `to` has at least its size.
template <typename From, typename To, typename F>
void for_each_pair(const Matrix<From>& from, const Matrix<To>& to, F f) {
  constexpr int64_t SIDE = 16;  // of squares: the cache lines of both matrices stay in the cache
  if (to.column_stride != 1 && to.row_stride == 1) return for_each_pair(from.t(), to.t(), f);
  const int64_t side = from.column_stride == 1 ? from.columns : SIDE;
  for (int64_t left = 0; left < from.columns; left += side)
    for (int64_t row = 0; row < from.rows; ++row) {
      const int64_t count = std::min(side, from.columns - left);
      From* const source = from.data + row * from.row_stride + left * from.column_stride;
      To* const target = to.data + row * to.row_stride + left * to.column_stride;
      if (from.column_stride == 1 && to.column_stride == 1)
        for (int64_t j = 0; j < count; ++j) f(source[j], target[j]);
      else
        for (int64_t j = 0; j < count; ++j) f(source[j * from.column_stride], target[j * to.column_stride]);
    }
}

// Writes the sum of squares of each row. In double: the last digits of squares of 16-bit numbers are not random, and
// rounding errors of float sums would add up.
template <typename T>
void sum_squares(const Matrix<const T>& rows, double* sums) {
  constexpr int64_t LANES = 8;  // sums of a row, which a compiler would not form by itself: they change the order
  std::fill_n(sums, rows.rows, 0.0);
  const auto square = [](T value) { return static_cast<double>(value) * static_cast<double>(value); };
  if (rows.column_stride != 1) {
    for (int64_t column = 0; column < rows.columns; ++column) {
      const T* const values = rows.data + column * rows.column_stride;
      if (rows.row_stride == 1)  // known to the compiler in this loop
        for (int64_t row = 0; row < rows.rows; ++row) sums[row] += square(values[row]);
      else
        for (int64_t row = 0; row < rows.rows; ++row) sums[row] += square(values[row * rows.row_stride]);
    }
    return;
  }
  for (int64_t row = 0; row < rows.rows; ++row) {
    const T* const values = rows.data + row * rows.row_stride;
    double parts[LANES] = {};
    int64_t column = 0;
    for (; column + LANES <= rows.columns; column += LANES)
      for (int64_t lane = 0; lane < LANES; ++lane) parts[lane] += square(values[column + lane]);
    for (; column < rows.columns; ++column) sums[row] += square(values[column]);
    for (const double part : parts) sums[row] += part;
  }
}

// to = from^T, both row-major, in vectors. Returns false, and writes nothing, if torch has no function for that. Only
// the bits matter: elements of other types of the same size are passed as these.
bool transpose(Matrix<const float> from, Matrix<float> to);
bool transpose(Matrix<const uint16_t> from, Matrix<uint16_t> to);

template <typename From, typename To>
void copy(const Matrix<From>& from, const Matrix<To>& to) {
  if constexpr (std::is_same_v<std::remove_const_t<From>, To> && (sizeof(To) == 2 || sizeof(To) == 4)) {
    using Bits = std::conditional_t<sizeof(To) == 2, uint16_t, float>;
    const auto source = from.template reinterpreted<const Bits>();
    const auto target = to.template reinterpreted<Bits>();
    if (source.t().row_major() && target.row_major() && transpose(source.t(), target)) return;
    if (source.row_major() && target.t().row_major() && transpose(source, target.t())) return;
  }
  for_each_pair(from, to, [](const From& source, To& target) { target = static_cast<To>(source); });
}

}  // namespace srpkd::cpu
